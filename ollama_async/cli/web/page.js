import { AnswerError, Answers, newId } from "./answers.js";
import { CUT, CallView, ContextView, called, isCall, returned, settled, steps, told } from "./calls.js";
import { make } from "./dom.js";
import { Markdown, loaded } from "./markdown.js";

const page = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
const SAVED = "conversation";
const OWNER = "owner";
/** How many bytes the page's server takes at most. */
const LONGEST_QUESTION = 4 * 1024 * 1024;

/**
 * What has been said: users' turns {role, content}, and answers {role, content, thinking, calls, model}, which have an
 * `end` or, while one is under way, a `run`: {id, after, tokens, began, first, adopted}. The number of the event that
 * came last, `after`, belongs to the content and the `calls` of tools: all are kept together, so that a reload goes on
 * where the page was. `context` is what an answer that has ended has used of the model's context.
 */
let turns = [];
/** The views of the turns, in the same order. */
let views = [];
/** The answer that this tab watches, if it does: {view, answer, ticking, failures}. */
let running = null;

const answers = new Answers("api/answers", { request: { headers: { "X-Chat-Owner": owner() } } });

/** Whose answers are this browser's: its tabs show one another's, other browsers do not. */
function owner() {
  try {
    const known = localStorage.getItem(OWNER) ?? newId();
    localStorage.setItem(OWNER, known);
    return known;
  } catch {
    return newId(); // then a reload finds nothing
  }
}

// -- what the page says of itself --

/** Say in which state the page is. A screen reader says it too, so what ticks is kept apart, in the meter. */
function say(state, text) {
  page.state.dataset.state = state;
  page.status.textContent = text;
}

const seconds = (ms) => `${(ms / 1000).toFixed(1)} s`;
const counted = (tokens) => `${tokens} token${tokens === 1 ? "" : "s"}`;

function tick() {
  const { tokens, began, first } = running.view.turn.run;
  const now = Date.now();
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

class UserView {
  constructor({ content }) {
    this.element = make("article", { className: "user" });
    this.element.append(make("h2", { className: "unseen", textContent: "You" }), content);
  }
}

class AnswerView {
  constructor(turn) {
    this.turn = turn;
    this.body = make("div");
    /** What is shown of each step: {written, markdown, calls}. */
    this.steps = [];
    this.summary = make("summary", { textContent: "Thinking" });
    this.thought = make("p");
    this.thinking = make("details", { className: "thinking", hidden: true }, this.summary, this.thought);
    this.note = make("div", { className: "note", hidden: true });
    this.context = new ContextView();
    this.element = make("article", { className: "answer" });
    const heading = make("h2", { textContent: turn.model });
    this.element.append(heading, this.thinking, this.body, this.note, this.context.element);
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
    const shown = steps(this.turn).map((step, place) => this.#step(place, step, whole));
    after();
    Promise.all(shown).then(() => {
      // A quarter of the time at most goes into showing, however long the answer is.
      this.pause = Math.max(30, 3 * (performance.now() - began));
    });
  }

  /** Show a step: what the model wrote, and the tools that it called then. */
  #step(place, { text, calls }, whole) {
    const view = (this.steps[place] ??= this.#begin());
    for (const [at, call] of calls.entries()) {
      if (!view.calls[at]) view.list.append((view.calls[at] = new CallView()).element);
      view.calls[at].show(call);
    }
    return view.markdown.show(text, { whole: whole || calls.length > 0 });
  }

  #begin() {
    const [written, list] = [make("div", { className: "written" }), make("div", { className: "calls" })];
    this.body.append(written, list);
    return { markdown: new Markdown(written, follow), list, calls: [] };
  }

  /** Show how the answer ended, and what can be done then. */
  end() {
    const { end, content, context } = this.turn;
    this.note.hidden = !end;
    this.context.show(end ? context : null);
    if (!end) return;
    this.note.dataset.state = end.state;
    this.note.replaceChildren(make("span", { textContent: end.text }));
    const last = turns.at(-1) === this.turn;
    if (content) this.#offer("Copy", () => this.#copy());
    if (last) this.#offer("Retry", retry);
    if (last && !isEmpty(this.turn) && end.state !== "done") this.#offer("Continue", resume);
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
  if (typeof turn?.content !== "string" || (turn.run && !isRun(turn.run))) return false;
  if (turn.role === "user") return true;
  const { role, thinking, calls } = turn;
  return role === "assistant" && typeof thinking === "string" && Array.isArray(calls) && calls.every(isCall);
}

function isRun({ id, ...numbers }) {
  const { after, tokens, began, first } = numbers;
  return typeof id === "string" && [after, tokens, began, first].every(Number.isFinite);
}

// -- asking --

const isEmpty = ({ role, content, calls }) => role === "assistant" && !content && !calls.length;

/** The conversation, without the answer that is about to come. What of it the model is told, `Chat` says on the server. */
function messages() {
  const past = isEmpty(turns.at(-1)) ? turns.slice(0, -1) : turns;
  return past.flatMap((turn) => (turn.role === "user" ? [{ role: "user", content: turn.content }] : told(turn)));
}

const newAnswer = (model) => ({ role: "assistant", model, content: "", thinking: "", calls: [] });

function ask(text) {
  add({ role: "user", content: text });
  answer(add(newAnswer(page.model.value)));
}

function retry() {
  if (running) return;
  drop();
  answer(add(newAnswer(page.model.value)));
}

function resume() {
  if (running) return;
  const view = views.at(-1);
  view.turn.model = page.model.value;
  delete view.turn.end;
  delete view.turn.context;
  view.end();
  answer(view);
}

/** Have the model answer. */
function answer(view) {
  const { turn } = view;
  const question = { model: turn.model, messages: messages() };
  const { size } = new Blob([JSON.stringify(question)]);
  if (size > LONGEST_QUESTION) {
    const [has, most] = [size, LONGEST_QUESTION].map((bytes) => (bytes / 1024 / 1024).toFixed(1));
    conclude(view, { state: "failed", text: `The conversation has ${has} MB, of at most ${most}: begin a new chat` });
    return;
  }
  turn.run = { id: newId(), after: 0, tokens: 0, began: Date.now(), first: 0, adopted: false };
  watch(begin(view, answers.start("api/chat", question, { id: turn.run.id })));
}

/** Note that an answer is under way. */
function begin(view, watched) {
  running = { view, answer: watched, failures: 0 };
  running.ticking = setInterval(tick, 250);
  save();
  busy(true);
  progress();
  tick();
  return running;
}

/** Have the answer come, over as many connections as it takes. */
async function watch(run) {
  run.answer.onstate = (state) => connected(run, state);
  try {
    for await (const event of run.answer) {
      if (running !== run) return;
      take(run, event);
    }
    // Where its end had come already, before the page was left.
    if (running === run) finish(run, { state: "done", text: `Done ${after(run)}` });
  } catch (error) {
    if (running !== run) return;
    // Whatever has failed here, the model does not go on for nobody.
    if (!(error instanceof AnswerError)) run.answer.stop("the page failed");
    finish(run, failed(run, error));
  }
}

/** Say what the answer waits for. */
function progress() {
  const { run, calls, model } = running.view.turn;
  const names = calls.filter(({ state }) => state === "running").map(({ name }) => name);
  if (names.length) say("waiting", `Waiting for ${names.length > 1 ? "tools" : "the tool"}: ${names.join(", ")}`);
  else if (run.tokens) say("answering", "Answering");
  else say("waiting", `Waiting for ${model}, which may be loading`);
}

/** Tell of a connection that was lost, and is there again. */
function connected(run, state) {
  if (running !== run) return;
  if (state === "receiving") [run.failures] = [0, progress()];
  if (state !== "waiting") return;
  run.failures += 1;
  const gone = `The page's own server is gone, ${after(run)}: is "ollama-async web" still running? Trying again`;
  if (!navigator.onLine) say("waiting", `Offline ${after(run)}; the answer goes on for some time`);
  else say("waiting", run.failures === 1 ? "The connection was lost; trying again" : gone);
}

function take(run, { name, number, data }) {
  const { turn } = run.view;
  turn.run.after = number;
  if (name === "open" && turn.run.adopted) turn.run.began = Math.min(turn.run.began, 1000 * data.begun);
  if (name === "chunk") read(run, data.message);
  if (name !== "end") return;
  turn.context = data.context_usage ?? null;
  finish(run, ended(run, data));
}

function read(run, message) {
  const { turn } = run.view;
  if (message?.role === "tool" || message?.tool_calls) {
    if (message.role === "tool") returned(turn, message);
    else for (const call of message.tool_calls) called(turn, call);
    progress();
    run.view.update();
    return;
  }
  if (!message?.content && !message?.thinking) return;
  turn.run.tokens += 1;
  turn.content += message.content ?? "";
  turn.thinking += message.thinking ?? "";
  if (turn.run.tokens === 1) {
    turn.run.first = turn.run.adopted ? turn.run.began : Date.now();
    progress();
    tick();
  }
  run.view.update();
}

// -- how an answer ends --

function after({ view }) {
  const { tokens, began } = view.turn.run;
  const time = seconds(Date.now() - began);
  return tokens ? `after ${counted(tokens)} in ${time}` : `after ${time}, before the first token`;
}

function ended(run, { outcome, reason, error, error_type: kind }) {
  if (kind === "ConnectionBroken") return { state: "failed", text: `The Ollama server is gone, ${after(run)}` };
  const { tokens, began } = run.view.turn.run;
  const outcomes = {
    done: () => ({ state: "done", text: `Done: ${counted(tokens)} in ${seconds(Date.now() - began)}` }),
    truncated: () => ({ state: "failed", text: `The server ended the answer too early, ${after(run)}` }),
    timeout: () => ({ state: "failed", text: `Timed out ${after(run)}: ${error}` }),
    aborted: () => ({ state: "stopped", text: `Stopped ${after(run)}${reason ? `: ${reason}` : ""}` }),
    lost: () => lost(run),
  };
  return (outcomes[outcome] ?? (() => ({ state: "failed", text: `Failed ${after(run)}: ${error ?? outcome}` })))();
}

const lost = (run) => ({ state: "failed", text: `Lost ${after(run)}: the server that produced the answer has ended` });

function failed(run, error) {
  if (!(error instanceof AnswerError)) return { state: "failed", text: `The page failed ${after(run)}: ${error}` };
  // Its server was started anew.
  if (error.code === "unknown" || error.code === "gone") return lost(run);
  return { state: "failed", text: error.message };
}

/** End an answer; the first end counts. The page is in its new state before anything is drawn. */
function finish(run, end) {
  if (running !== run) return;
  release();
  conclude(run.view, end);
}

function conclude(view, end) {
  view.turn.end = end;
  settled(view.turn);
  say(end.state, view.turn.context?.cut ? `${end.text}. ${CUT}` : end.text);
  save();
  const after = follow();
  draw(() => view.end());
  draw(() => view.show());
  after();
}

/** Watch no answer any more. */
function release() {
  const { view, ticking } = running;
  running = null;
  clearInterval(ticking);
  delete view.turn.run;
  busy(false);
  page.meter.textContent = "";
}

function stop() {
  const run = running;
  if (!run) return;
  run.answer.stop("the user pressed Stop");
  finish(run, { state: "stopped", text: `Stopped by you ${after(run)}` });
}

// -- an answer that was under way before this page was --

/** Go on with the answer of this tab; without one, show that which runs in another tab of this browser. */
async function adopt() {
  const view = views.at(-1);
  const left = view?.turn.run;
  if (left) watch(begin(view, answers.attach(left.id, { after: left.after })));
  if (turns.length) return;
  const found = await look().catch(() => null);
  // The user may have been faster.
  if (!found || turns.length) return;
  const { id, model, messages } = found;
  const shown = conversation(messages, model);
  const partial = shown.at(-1)?.role === "assistant" ? shown.pop() : newAnswer(model);
  for (const turn of shown) add(turn.role === "user" ? turn : { ...turn, end: { state: "done", text: "" } });
  const run = { id, after: 0, tokens: 0, began: Date.now(), first: 0, adopted: true };
  watch(begin(add({ ...partial, run }), answers.attach(id)));
}

/** Return the turns that messages come from: the way back from `messages()`, of what the model was told. */
function conversation(messages, model) {
  const found = [];
  for (const message of messages) {
    const { role, content, tool_calls } = message;
    if (role === "user") found.push({ role, content });
    else if (found.at(-1)?.role !== "assistant") found.push(newAnswer(model));
    const turn = found.at(-1);
    if (role === "tool") returned(turn, message);
    if (role !== "assistant") continue;
    turn.content += content;
    for (const call of tool_calls ?? []) called(turn, call);
  }
  return found;
}

/** Return what runs for this browser, with its question. */
async function look() {
  const last = (await answers.running()).at(-1);
  if (!last) return null;
  const response = await fetch(`api/questions/${last.id}`, answers.requested({}));
  return response.ok ? { id: last.id, ...(await response.json()) } : null;
}

// -- controls --

function busy(now) {
  const focused = document.activeElement === page.send || document.activeElement === page.stop;
  page.send.hidden = now;
  page.stop.hidden = !now;
  // What another tab has asked for goes on without this one.
  page.new.disabled = now && !running.view.turn.run.adopted;
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
  if (running) {
    running.answer.detach();
    release();
  }
  while (turns.length) drop();
  save();
  say("idle", "Ready");
  page.prompt.focus();
});

page.model.addEventListener("change", save);

// What came is kept, and where the answer goes on. A phone ends pages that are not seen, and tells them nothing more.
addEventListener("pagehide", save);
document.addEventListener("visibilitychange", () => document.hidden && save());

// -- the beginning --

async function lookForModels() {
  const tell = (state, text) => running || say(state, text);
  // How an answer has ended that was watched meanwhile stays to be read.
  const watched = running;
  tell("idle", "Looking for models");
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
    if (!watched || !options.length) tell("idle", options.length ? "Ready" : "The server has no model; get one with: ollama-async pull llama3.2");
  } catch (error) {
    page.model.replaceChildren(make("option", { textContent: "no models" }));
    tell("failed", error instanceof TypeError ? 'No answer: is "ollama-async web" still running?' : error.message);
    const again = make("button", { type: "button", textContent: "Look again", onclick: lookForModels });
    if (!running) page.meter.replaceChildren(again);
    return;
  }
  if (!running && !watched) page.meter.textContent = "";
}

for (const turn of saved().turns) draw(() => add(turn));
page.prompt.focus();
// Then the first answer is drawn without delay. It is not waited for long: an answer is worth more than its looks.
await Promise.race([loaded, new Promise((resolve) => setTimeout(resolve, 2000))]);
await adopt();
await lookForModels();
