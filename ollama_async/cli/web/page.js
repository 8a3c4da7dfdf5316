import { events } from "./events.js";
import { Markdown, loaded } from "./markdown.js";

const page = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
const SAVED = "conversation";
/** How many bytes the page's server takes at most. */
const LONGEST_QUESTION = 4 * 1024 * 1024;

/** What has been said: users' turns {role, content}, and answers {role, content, thinking, model, end}. */
let turns = [];
/** The views of the turns, in the same order. */
let views = [];
/** The answer that is under way, if one is. */
let running = null;

// -- what the page says of itself --

/** Say in which state the page is. A screen reader says it too, so what ticks is kept apart, in the meter. */
function say(state, text) {
  page.state.dataset.state = state;
  page.status.textContent = text;
}

const seconds = (ms) => `${(ms / 1000).toFixed(1)} s`;
const counted = (tokens) => `${tokens} token${tokens === 1 ? "" : "s"}`;

function tick() {
  const { tokens, began, first } = running;
  const now = performance.now();
  const rate = tokens > 1 && now > first ? `, ${((tokens - 1) / ((now - first) / 1000)).toFixed(1)} tokens/s` : "";
  page.meter.textContent = tokens ? `${counted(tokens)}${rate}` : `${Math.round((now - began) / 1000)} s`;
}

// -- the turns on the page --

/**
 * Draw something. What fails here is told to the console and to nobody else: whatever the page does has been decided
 * before, and goes on.
 */
function draw(what) {
  try {
    what();
  } catch (error) {
    console.error(error);
  }
}

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

class UserView {
  constructor({ content }) {
    this.element = make("article", { className: "user" });
    this.element.append(make("h2", { className: "unseen", textContent: "You" }), content);
  }
}

class AnswerView {
  constructor(turn) {
    this.turn = turn;
    this.written = make("div", { className: "written" });
    this.markdown = new Markdown(this.written, follow);
    this.summary = make("summary", { textContent: "Thinking" });
    this.thought = make("p");
    this.thinking = make("details", { className: "thinking", hidden: true }, this.summary, this.thought);
    this.note = make("div", { className: "note", hidden: true });
    this.element = make("article", { className: "answer" });
    this.element.append(make("h2", { textContent: turn.model }), this.thinking, this.written, this.note);
    this.due = null;
    this.pause = 0;
    draw(() => this.show());
    draw(() => this.end());
  }

  /** Show what came, soon: a fast model writes a thousand tokens a second, and nobody reads them one by one. */
  update() {
    this.due ??= setTimeout(() => draw(() => this.show()), this.pause);
  }

  show({ whole = Boolean(this.turn.end) } = {}) {
    clearTimeout(this.due);
    this.due = null;
    const began = performance.now();
    const after = follow();
    const { content, thinking } = this.turn;
    if (thinking && this.thinking.hidden) [this.thinking.hidden, this.thinking.open] = [false, !whole];
    if (content && this.summary.textContent === "Thinking") {
      this.summary.textContent = "Thoughts";
      this.thinking.open = false;
    }
    if (this.thought.textContent !== thinking) this.thought.textContent = thinking;
    after();
    this.markdown.show(content, { whole }).then(() => {
      // A quarter of the time at most goes into showing, however long the answer is.
      this.pause = Math.max(30, 3 * (performance.now() - began));
    });
  }

  /** Show how the answer ended, and what can be done then. */
  end() {
    const { end, content } = this.turn;
    this.note.hidden = !end;
    if (!end) return;
    this.note.dataset.state = end.state;
    this.note.replaceChildren(make("span", { textContent: end.text }));
    const last = turns.at(-1) === this.turn;
    if (content) this.#offer("Copy", () => this.#copy());
    if (last) this.#offer("Retry", retry);
    if (last && content && end.state !== "done") this.#offer("Continue", resume);
  }

  async #copy() {
    try {
      await navigator.clipboard.writeText(this.turn.content);
      page.meter.textContent = "copied";
    } catch {
      // Some browsers have no clipboard for pages that come neither from this machine nor over https.
      page.meter.textContent = "the browser does not let the page copy: select the text";
    }
  }

  #offer(name, act) {
    this.note.append(make("button", { type: "button", textContent: name, onclick: act }));
  }
}

const atEnd = () => page.conversation.scrollHeight - page.conversation.scrollTop - page.conversation.clientHeight < 40;
const toEnd = () => draw(() => page.conversation.scrollTo({ top: page.conversation.scrollHeight }));

/** Note whether the end is seen; what is returned shows it again, if it was. */
function follow() {
  const stuck = atEnd();
  return () => stuck && toEnd();
}

function add(turn) {
  const before = views.at(-1);
  turns.push(turn);
  const view = turn.role === "user" ? new UserView(turn) : new AnswerView(turn);
  views.push(view);
  page.conversation.append(view.element);
  draw(() => before?.end?.());
  page.welcome.hidden = true;
  toEnd();
  return view;
}

function drop() {
  turns.pop();
  views.pop().element.remove();
  page.welcome.hidden = turns.length > 0;
}

// -- keeping the conversation over a reload, for this tab only --

function save() {
  try {
    sessionStorage.setItem(SAVED, JSON.stringify({ turns, model: page.model.value }));
  } catch {
    // It is too long to be kept: a reload will lose it.
  }
}

function saved() {
  try {
    const { turns, model } = JSON.parse(sessionStorage.getItem(SAVED)) ?? {};
    return { turns: Array.isArray(turns) ? turns.filter(isTurn) : [], model };
  } catch {
    return { turns: [] };
  }
}

/** Whether it is a turn as this version of the page has them. */
function isTurn(turn) {
  if (typeof turn?.content !== "string") return false;
  return turn.role === "user" || (turn.role === "assistant" && typeof turn.thinking === "string");
}

// -- asking --

/** What the model is told: a question that got no answer at all is left out, it may have been asked again. */
function messages() {
  const told = [];
  turns.forEach(({ role, content }, place) => {
    const next = turns[place + 1];
    if (role === "user" && next && !next.content && place + 2 < turns.length) return;
    if (content) told.push({ role, content });
  });
  return told;
}

function ask(text) {
  add({ role: "user", content: text });
  const view = add({ role: "assistant", model: page.model.value, content: "", thinking: "" });
  answer(view);
}

function retry() {
  if (running) return;
  drop();
  answer(add({ role: "assistant", model: page.model.value, content: "", thinking: "" }));
}

function resume() {
  if (running) return;
  const view = views.at(-1);
  view.turn.model = page.model.value;
  delete view.turn.end;
  view.end();
  answer(view);
}

/** A number that nobody can guess: who knows it may stop the stream. */
function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(24));
  return btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_");
}

async function answer(view) {
  const run = { view, id: newId(), abort: new AbortController(), tokens: 0, began: performance.now(), first: 0 };
  running = run;
  busy(true);
  say("waiting", `Waiting for ${view.turn.model}, which may be loading`);
  tick();
  run.ticking = setInterval(tick, 250);
  try {
    finish(run, ended(run, await receive(run)));
  } catch (error) {
    // Whatever has failed here, the model does not go on for nobody.
    run.abort.abort();
    finish(run, failed(run, error));
  }
}

/** Have the answer come, and return how the server says that it ended. */
async function receive(run) {
  const { turn } = run.view;
  const body = new Blob([JSON.stringify({ model: turn.model, messages: messages() })]);
  if (body.size > LONGEST_QUESTION) {
    const [size, most] = [body.size, LONGEST_QUESTION].map((bytes) => (bytes / 1024 / 1024).toFixed(1));
    return { outcome: "refused", error: `The conversation has ${size} MB, of at most ${most}: begin a new chat` };
  }
  const response = await fetch("api/chat", {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Stream-Id": run.id },
    body,
    signal: run.abort.signal,
  });
  if (!response.ok) {
    const problem = await response.json().catch(() => null);
    return { outcome: "refused", error: problem?.error ?? `The page's server answered with status ${response.status}` };
  }
  for await (const { name, data } of events(response.body)) {
    if (running !== run) break;
    if (name === "chunk") take(run, JSON.parse(data));
    if (name === "end") return JSON.parse(data);
  }
  throw new TypeError("the body ended without telling how");
}

function take(run, { message }) {
  if (!message?.content && !message?.thinking) return;
  run.tokens += 1;
  if (run.tokens === 1) {
    run.first = performance.now();
    say("answering", "Answering");
    tick();
  }
  run.view.turn.content += message.content ?? "";
  run.view.turn.thinking += message.thinking ?? "";
  run.view.update();
}

// -- how an answer ends --

const after = ({ tokens, began }) =>
  tokens
    ? `after ${counted(tokens)} in ${seconds(performance.now() - began)}`
    : `after ${seconds(performance.now() - began)}, before anything came`;

function ended(run, { outcome, reason, error, error_type: kind }) {
  if (kind === "ConnectionBroken") return { state: "failed", text: `The Ollama server is gone, ${after(run)}` };
  const outcomes = {
    done: () => ({ state: "done", text: `Done: ${counted(run.tokens)} in ${seconds(performance.now() - run.began)}` }),
    truncated: () => ({ state: "failed", text: `The server ended the answer too early, ${after(run)}` }),
    timeout: () => ({ state: "failed", text: `Timed out ${after(run)}: ${error}` }),
    aborted: () => ({ state: "stopped", text: `Stopped ${after(run)}${reason ? `: ${reason}` : ""}` }),
    refused: () => ({ state: "failed", text: error }),
  };
  return (outcomes[outcome] ?? (() => ({ state: "failed", text: `Failed ${after(run)}: ${error ?? outcome}` })))();
}

/** A fetch that breaks off is a TypeError, in each browser with other words. */
function failed(run, error) {
  const gone = `The page's own server is gone, ${after(run)}: is "ollama-async web" still running?`;
  return { state: "failed", text: error instanceof TypeError ? gone : `The page failed ${after(run)}: ${error}` };
}

/** End an answer; the first end counts. The page is in its new state before anything is drawn. */
function finish(run, end) {
  if (running !== run) return;
  running = null;
  clearInterval(run.ticking);
  run.view.turn.end = end;
  busy(false);
  say(end.state, end.text);
  page.meter.textContent = "";
  save();
  const after = follow();
  draw(() => run.view.end());
  draw(() => run.view.show());
  after();
}

function stop() {
  const run = running;
  if (!run) return;
  // By two ways, so that nothing which keeps one of them up keeps the other: the server ends the stream, or finds that
  // its reader has left. Both work before the first byte of the answer.
  const reason = "the user pressed Stop";
  const headers = { "Content-Type": "application/json" };
  const request = { method: "POST", headers, body: JSON.stringify({ reason }), keepalive: true };
  fetch(`api/stop/${run.id}`, request).catch(() => {});
  run.abort.abort();
  finish(run, { state: "stopped", text: `Stopped by you ${after(run)}` });
}

// -- controls --

function busy(now) {
  const focused = document.activeElement === page.send || document.activeElement === page.stop;
  page.send.hidden = now;
  page.stop.hidden = !now;
  page.new.disabled = now;
  page.conversation.setAttribute("aria-busy", String(now));
  for (const button of page.conversation.querySelectorAll(".note button")) button.disabled = now;
  // The button that had the focus is gone; without this the keyboard would be back at the top of the page.
  if (focused || document.activeElement === document.body) page.prompt.focus();
}

function send() {
  const text = page.prompt.value.trim();
  if (!text || running || page.model.disabled) return;
  page.prompt.value = "";
  ask(text);
}

page.composer.addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});

page.prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || !running) return;
  event.preventDefault();
  stop();
});

page.stop.addEventListener("click", stop);

page.new.addEventListener("click", () => {
  while (turns.length) drop();
  save();
  say("idle", "Ready");
  page.prompt.focus();
});

page.model.addEventListener("change", save);

// Reload, navigation and a closed tab: the browser ends the request by itself; this keeps what came.
addEventListener("pagehide", () => {
  const run = running;
  if (!run) return;
  run.abort.abort();
  finish(run, { state: "stopped", text: `Stopped ${after(run)}: the page was left` });
});

// -- the beginning --

async function lookForModels() {
  say("idle", "Looking for models");
  try {
    const response = await fetch("api/models");
    const found = await response.json();
    if (!response.ok) throw new Error(found.error);
    const chosen = saved().model ?? found.default;
    const options = found.models.map((name) => make("option", { value: name, textContent: name }));
    page.model.replaceChildren(...options);
    if (found.models.includes(chosen)) page.model.value = chosen;
    page.model.disabled = !options.length;
    page.notice.textContent = found.notice;
    page.notice.hidden = !found.notice;
    say("idle", options.length ? "Ready" : "The server has no model; get one with: ollama-async pull llama3.2");
  } catch (error) {
    page.model.replaceChildren(make("option", { textContent: "no models" }));
    say("failed", error instanceof TypeError ? 'No answer: is "ollama-async web" still running?' : error.message);
    page.meter.replaceChildren(make("button", { type: "button", textContent: "Look again", onclick: lookForModels }));
    return;
  }
  page.meter.textContent = "";
}

for (const turn of saved().turns) draw(() => add(turn));
page.prompt.focus();
// Then the first answer is drawn without delay. It is not waited for long: an answer is worth more than its looks.
await Promise.race([loaded, new Promise((resolve) => setTimeout(resolve, 2000))]);
await lookForModels();
