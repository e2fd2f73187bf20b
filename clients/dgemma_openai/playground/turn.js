// One answer on the page, while it comes and afterwards. Text goes in as text, never as HTML. Knows no request.

import { spans, step } from "./diff.js";
import { figures } from "./figures.js";

const REDUCED_MS = 500; // between two pictures, for those who asked for little motion
const REPLAY_MS = 150;
const reduced = matchMedia("(prefers-reduced-motion: reduce)");

export class Turn {
  #part; // name -> element
  #steps = []; // {canvas, step, picture, committed}, in order
  #started = performance.now();
  #firstCanvasMs = null;
  #drawing = false;
  #replay = null;
  #calls = [];
  #ended = false;
  #usage = null;

  content = "";

  constructor(template, parent) {
    const root = template.content.firstElementChild.cloneNode(true);
    this.#part = Object.fromEntries([...root.querySelectorAll("[data-part]")].map((part) => [part.dataset.part, part]));
    this.#part.slider.addEventListener("input", () => {
      clearInterval(this.#replay);
      this.#show(Number(this.#part.slider.value));
    });
    this.#part.replay.addEventListener("click", () => this.#play());
    parent.append(root);
    this.#say("waiting");
  }

  /** A chunk of the stream. */
  take({ choices, diffusing, usage }) {
    if (diffusing?.text != null) this.#preview(diffusing);
    else if (diffusing) this.#prefill(diffusing);
    if (usage) this.#usage = usage;
    for (const { delta, finish_reason: reason } of choices) {
      if (delta.content || delta.reasoning_content || delta.tool_calls) this.#commit(delta);
      if (reason) this.#part.end.textContent = `ended: ${reason}`;
    }
  }

  /** No more comes. `problem` is what to tell, if the answer did not end by itself. */
  end(problem = "") {
    this.#ended = true;
    this.#part.problem.textContent = problem;
    this.#part.problem.hidden = !problem;
    this.#part.canvas.replaceChildren();
    this.#part.state.hidden = this.#part.prefill.hidden = true;
    if (this.#usage) this.#figures(this.#usage);
    if (!this.#steps.length) return;
    this.#part.slider.max = this.#part.slider.value = this.#steps.length;
    this.#part.history.hidden = false;
    this.#show(this.#steps.length);
  }

  #prefill({ prefilled_tokens: done, prompt_tokens: all }) {
    this.#part.prefill.hidden = false;
    this.#part.prefill.max = all;
    this.#part.prefill.value = done;
    this.#say(`reading the prompt: ${done} of ${all} tokens`);
  }

  #preview({ canvas_index: canvas, step: number, text }) {
    this.#part.prefill.hidden = true;
    const last = this.#steps.at(-1);
    const picture = step(last?.canvas === canvas ? last.picture : null, text);
    this.#steps.push({ canvas, step: number, picture, committed: this.content.length });
    this.#say(`canvas ${canvas + 1}, step ${number}`);
    if (this.#drawing) return;
    this.#drawing = true;
    const draw = () => requestAnimationFrame(() => this.#draw());
    if (reduced.matches && this.#steps.length > 1) setTimeout(draw, REDUCED_MS);
    else draw();
  }

  #draw() {
    this.#drawing = false;
    const last = this.#steps.at(-1);
    if (this.#ended || last.done) return;
    paint(this.#part.canvas, last.picture);
  }

  #commit(delta) {
    this.#firstCanvasMs ??= performance.now() - this.#started;
    if (this.#steps.length) this.#steps.at(-1).done = true; // the canvas has become this text
    this.#part.canvas.replaceChildren();
    if (delta.reasoning_content) {
      this.#part.thinking.hidden = false;
      this.#part.reasoning.append(delta.reasoning_content);
    }
    if (delta.content) {
      this.content += delta.content;
      this.#part.committed.append(delta.content);
    }
    for (const call of delta.tool_calls ?? []) this.#call(call);
  }

  #call({ index, id, function: { name, arguments: text } }) {
    if (!this.#calls[index]) {
      const card = document.createElement("section");
      card.className = "call";
      const title = card.appendChild(document.createElement("h3"));
      title.textContent = `calls ${name}`;
      title.title = id;
      this.#calls[index] = card.appendChild(document.createElement("pre"));
      this.#part.calls.append(card);
    }
    this.#calls[index].append(text ?? "");
  }

  #figures(usage) {
    const totalMs = performance.now() - this.#started;
    for (const [name, value] of figures(usage, this.#steps, totalMs, this.#firstCanvasMs)) {
      const row = document.createElement("div");
      row.appendChild(document.createElement("dt")).textContent = name;
      row.appendChild(document.createElement("dd")).textContent = value;
      this.#part.figures.append(row);
    }
    this.#part.summary.hidden = false;
  }

  /** The answer as it was after a step, counted from 0; all steps: as it is. */
  #show(position) {
    const past = this.#steps[position];
    this.#part.committed.classList.toggle("unseen", Boolean(past)); // and still there for screen readers
    this.#part.past.textContent = past ? this.content.slice(0, past.committed) : "";
    this.#part.canvas.replaceChildren();
    if (past) paint(this.#part.canvas, past.picture);
    const words = past ? `canvas ${past.canvas + 1}, step ${past.step}` : "the answer";
    this.#part.position.textContent = words;
    this.#part.slider.setAttribute("aria-valuetext", words);
  }

  #play() {
    clearInterval(this.#replay);
    const { slider } = this.#part;
    slider.value = 0;
    this.#show(0);
    this.#replay = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      this.#show(Number(slider.value));
      if (slider.value === slider.max) clearInterval(this.#replay);
    }, reduced.matches ? REDUCED_MS : REPLAY_MS);
  }

  #say(text) {
    this.#part.state.textContent = text;
  }
}

function paint(canvas, picture) {
  const parts = spans(picture).map(({ text, age }) => {
    const span = document.createElement("span");
    span.className = `age${age}`;
    span.textContent = text;
    return span;
  });
  canvas.replaceChildren(...parts);
}
