// The page: form, conversation, key. Knows no canvas.

import { ApiError, asCurl, chat, chatBody, json, models, number } from "./api.js";
import { Turn } from "./turn.js";

const KEY = "dgemma-api-key"; // in sessionStorage: gone with the tab
const NEAR_PX = 40; // from the page's end: who is there is taken along
const at = (id) => document.getElementById(id);
const [prompt, model, key, parameters] = ["prompt", "model", "key", "parameters"].map(at);

let conversation = []; // messages that the next question follows on
let running = null; // the AbortController of the answer that comes
let lastBody = null;
let following = true; // whether what comes is scrolled to

async function loadModels() {
  const notice = at("notice");
  try {
    const served = await models(key.value);
    model.replaceChildren(...served.map(({ id }) => new Option(id, id)));
    const tokens = served[0].max_model_len.toLocaleString("en");
    at("context").textContent = `${tokens} tokens of context`;
    notice.textContent = "";
  } catch (error) {
    notice.textContent = words(error);
    if (error.status === 401) {
      at("settings").open = true;
      key.focus();
    }
  }
}

function body(question) {
  const form = new FormData(parameters);
  const fields = [...parameters.querySelectorAll("[data-number]")]
    .map(({ name, value }) => [name, value.trim()])
    .filter(([, value]) => value !== "")
    .map(([name, value]) => [name, number(value)]);
  const stops = form.get("stop").split("\n").filter(Boolean);
  if (stops.length) fields.push(["stop", JSON.stringify(stops.map((stop) => stop.replaceAll("\\n", "\n")))]);
  if (form.get("tools").trim()) fields.push(["tools", json(form.get("tools"))]);
  if (form.get("thinking")) fields.push(["chat_template_kwargs", '{"enable_thinking": true}']);
  const system = form.get("system").trim() ? [{ role: "system", content: form.get("system") }] : [];
  return chatBody(model.value, [...system, ...conversation, question], fields);
}

async function send() {
  if (!model.value) await loadModels();
  if (running || !model.value || !prompt.value.trim()) return;
  const question = { role: "user", content: prompt.value };
  lastBody = body(question);
  prompt.value = "";
  at("intro").hidden = true;
  const asked = at("log").appendChild(document.createElement("p"));
  asked.className = "question";
  asked.textContent = question.content;
  const turn = new Turn(at("turn"), at("log"));
  setRunning(new AbortController());
  scrollToEnd();
  try {
    for await (const chunk of chat(lastBody, key.value, running.signal)) turn.take(chunk);
    await turn.end();
  } catch (error) {
    await turn.end(error.name === "AbortError" ? "Stopped." : words(error));
  }
  if (turn.content) conversation.push(question, { role: "assistant", content: turn.content });
  else prompt.value ||= question.content; // nothing came: ask it again, or otherwise
  setRunning(null);
}

function setRunning(controller) {
  running = controller;
  const [shown, gone] = (controller ? ["stop", "send"] : ["send", "stop"]).map(at);
  const focused = document.activeElement === gone;
  shown.hidden = false;
  gone.hidden = true;
  if (focused) shown.focus();
  at("clear").disabled = Boolean(controller);
}

function words(error) {
  if (error instanceof ApiError) return error.status ? `${error.status}: ${error.message}` : error.message;
  return error instanceof TypeError ? `The server does not answer (${error.message}).` : String(error);
}

function scrollToEnd() {
  scrollTo(0, document.documentElement.scrollHeight);
}

function clear() {
  conversation = [];
  at("log").replaceChildren();
  at("intro").hidden = false;
  prompt.focus();
}

function showRequest() {
  const sent = prompt.value.trim() ? body({ role: "user", content: prompt.value }) : lastBody;
  at("curl").value = asCurl(sent ?? body({ role: "user", content: "Hello" }), Boolean(key.value));
  at("copied").textContent = "";
  at("request").showModal();
  at("curl").select();
}

async function copyRequest() {
  at("curl").select();
  try {
    await navigator.clipboard.writeText(at("curl").value); // browsers give it to secure pages only
    at("copied").textContent = "Copied.";
  } catch {
    at("copied").textContent = "The text is selected; copy it with Ctrl+C.";
  }
}

addEventListener("scroll", () => {
  following = innerHeight + scrollY > document.documentElement.scrollHeight - NEAR_PX;
});
new ResizeObserver(() => following && scrollToEnd()).observe(at("log"));
at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
parameters.addEventListener("submit", (event) => event.preventDefault());
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !at("request").open) running?.abort();
});
key.addEventListener("change", () => {
  if (key.value) sessionStorage.setItem(KEY, key.value);
  else sessionStorage.removeItem(KEY);
  loadModels();
});
at("stop").addEventListener("click", () => running?.abort());
at("clear").addEventListener("click", clear);
at("show-request").addEventListener("click", showRequest);
at("copy-request").addEventListener("click", copyRequest);
for (const example of document.querySelectorAll("[data-prompt]")) {
  example.addEventListener("click", () => {
    prompt.value = example.dataset.prompt;
    prompt.focus();
  });
}

key.value = sessionStorage.getItem(KEY) ?? "";
at("settings").open = matchMedia("(min-width: 60rem)").matches;
loadModels();
