// One answer on the page, while it comes and afterwards. Text goes in as text, never as HTML. Knows no request.

import { spans, step } from "./diff.js";
import { figures } from "./figures.js";

const PACE_MS = 80; // that a picture stays at least, however fast the engine is; figures are taken as chunks arrive
const REDUCED_MS = 500; // between two pictures, for those who asked for little motion; others are left out
const BEHIND = 30; // chunks to show, from which on pictures are left out
const REPLAY_MS = 150;
const reduced = matchMedia("(prefers-reduced-motion: reduce)");

export class Turn {
  #part; // name -> element
  #steps = []; // {canvas, step, picture, committed}, in order
  #started = performance.now();
  #firstCanvasMs = null;
  #queue = []; // chunks to show
  #shown = null; // a promise while there are any
  #hurried = false;
  #paintedMs = -Infinity;
  #replay = null;
  #calls = [];
  #usage = null;
  #reason = "";

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

  /** A chunk of the stream, at the moment it arrives. */
  take(chunk) {
    if (chunk.choices.some(({ delta }) => saysSomething(delta))) this.#firstCanvasMs ??= this.#elapsedMs();
    this.#queue.push(chunk);
    this.#shown ??= this.#showAll();
  }

  /** No more comes; returns when all is shown. `problem` is what to tell, if the answer did not end by itself. */
  async end(problem = "") {
    const totalMs = this.#elapsedMs();
    this.#hurried = problem !== "";
    await this.#shown;
    this.#part.problem.textContent = problem;
    this.#part.problem.hidden = !problem;
    this.#part.canvas.replaceChildren();
    this.#part.state.hidden = this.#part.prefill.hidden = true;
    if (this.#usage) this.#figures(this.#usage, totalMs);
    if (!this.#steps.length) return;
    this.#part.slider.max = this.#part.slider.value = this.#steps.length;
    this.#part.history.hidden = false;
    this.#show(this.#steps.length);
  }

  async #showAll() {
    await null; // so that the promise is kept before it is let go
    while (this.#queue.length) {
      const { choices, diffusing, usage } = this.#queue.shift();
      if (diffusing?.text != null) await this.#preview(diffusing);
      else if (diffusing) this.#prefill(diffusing);
      if (usage) this.#usage = usage;
      for (const { delta, finish_reason: reason } of choices) {
        if (saysSomething(delta)) this.#commit(delta);
        if (reason) this.#reason = reason;
      }
    }
    this.#shown = null;
  }

  #prefill({ prefilled_tokens: done, prompt_tokens: all }) {
    this.#part.prefill.hidden = false;
    this.#part.prefill.max = all;
    this.#part.prefill.value = done;
    this.#say(`reading the prompt: ${done} of ${all} tokens`);
  }

  async #preview({ canvas_index: canvas, step: number, text }) {
    this.#part.prefill.hidden = true;
    const last = this.#steps.at(-1);
    const picture = step(last?.canvas === canvas ? last.picture : null, text);
    this.#steps.push({ canvas, step: number, picture, committed: this.content.length });
    this.#say(`canvas ${canvas + 1}, step ${number}`);
    if (reduced.matches && this.#elapsedMs() < this.#paintedMs + REDUCED_MS) return;
    paint(this.#part.canvas, picture);
    this.#paintedMs = this.#elapsedMs();
    if (!reduced.matches && !this.#hurried && this.#queue.length < BEHIND) await sleep(PACE_MS);
  }

  #commit(delta) {
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

  #figures(usage, totalMs) {
    for (const [name, value] of figures(usage, this.#steps, totalMs, this.#firstCanvasMs, this.#reason)) {
      const row = document.createElement("div");
      row.appendChild(document.createElement("dt")).textContent = name;
      row.appendChild(document.createElement("dd")).textContent = value;
      this.#part.figures.append(row);
    }
    this.#part.figures.hidden = false;
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

  #elapsedMs() {
    return performance.now() - this.#started;
  }

  #say(text) {
    this.#part.state.textContent = text;
  }
}

function saysSomething(delta) {
  return Boolean(delta.content || delta.reasoning_content || delta.tool_calls);
}

function sleep(ms) {
  return new Promise((resolve) => setTimeout(resolve, ms));
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
