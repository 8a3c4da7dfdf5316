/**
 * Calls of tools in an answer, and what it has used of the model's context.
 *
 * A call is {id, name, arguments, state, result, at, first}: `state` is `running`, or how it ended, as
 * `ToolFinished.outcome` of an agent; `at` is how much the model had written before; `first` tells that no other call
 * was running when it began.
 */

import { make } from "./dom.js";

/** Told of an answer whose conversation the model did not read as a whole. */
export const CUT = "The conversation is longer than the model's context: it did not read all of it";

const ABORTED = "aborted: the call was stopped before it had a result";
const STATES = {
  running: "is running",
  done: "done",
  error: "failed",
  denied: "denied",
  timeout: "timed out",
  aborted: "stopped",
};
/** So many characters of an argument or a result are shown; the model reads all of it. */
const SHOWN = 10_000;

/** Whether it is a call as this version of the page has them. */
export function isCall(call) {
  const { name, state, result, at } = call ?? {};
  return [name, state, result].every((each) => typeof each === "string") && Number.isFinite(at);
}

/** Note a call that has begun. */
export function called(turn, { id = null, function: { name, arguments: given } }) {
  const first = !turn.calls.some(({ state }) => state === "running");
  turn.calls.push({ id, name, arguments: given, state: "running", result: "", at: turn.content.length, first });
}

/** Note what a call came to. */
export function returned(turn, { content, tool_name: name, tool_call_id: id = null, outcome = "done" }) {
  const call = turn.calls.find((each) => each.state === "running" && each.name === name && each.id === id);
  if (call) Object.assign(call, { state: outcome in STATES ? outcome : "error", result: content });
}

/** Note that the answer is over: what still ran was stopped. */
export function settled(turn) {
  for (const call of turn.calls) {
    if (call.state === "running") Object.assign(call, { state: "aborted", result: ABORTED });
  }
}

/** Return what an answer is made of, in order: texts, and the calls of tools behind each, {text, calls}. */
export function steps({ content, calls }) {
  const found = [];
  let from = 0;
  for (const call of calls) {
    if (call.first) {
      found.push({ text: content.slice(from, call.at), calls: [] });
      from = call.at;
    }
    found.at(-1)?.calls.push(call);
  }
  if (from < content.length || !found.length) found.push({ text: content.slice(from), calls: [] });
  return found;
}

/** Return an answer as messages: at least one, empty where the answer ended before its first word. */
export function told(turn) {
  const messages = steps(turn).flatMap(({ text, calls }) => {
    if (!calls.length) return text ? [{ role: "assistant", content: text }] : [];
    const asked = calls.map(({ id, name, arguments: given }) => ({ id, function: { name, arguments: given } }));
    const results = calls.map(({ id, name, result }) => ({
      role: "tool",
      content: result || ABORTED,
      tool_name: name,
      tool_call_id: id,
    }));
    return [{ role: "assistant", content: text, tool_calls: asked }, ...results];
  });
  return messages.length ? messages : [{ role: "assistant", content: "" }];
}

const cut = (text) => (text.length > SHOWN ? `${text.slice(0, SHOWN)} ...` : text);

/** One call: its name and how it goes, and folded away its arguments and its result. */
export class CallView {
  constructor() {
    [this.name, this.given, this.result] = [make("code"), make("pre"), make("pre")];
    this.state = make("span", { className: "state" });
    this.ended = make("div", {}, make("h3", { textContent: "Result" }), this.result);
    const summary = make("summary", {}, this.name, " ", this.state);
    const heading = make("h3", { textContent: "Arguments" });
    this.element = make("details", { className: "call" }, summary, heading, this.given, this.ended);
  }

  show({ name, arguments: given, state, result }) {
    this.element.dataset.state = state;
    this.name.textContent = name;
    this.state.textContent = STATES[state];
    this.given.textContent = cut(JSON.stringify(given, null, 2));
    this.ended.hidden = state === "running";
    this.result.textContent = cut(result);
  }
}

const number = (count) => count.toLocaleString("en");

/** How much of the model's context an answer has used. */
export class ContextView {
  constructor() {
    [this.meter, this.text] = [make("meter"), make("span")];
    this.meter.setAttribute("aria-label", "Context used");
    this.warning = make("strong", { textContent: `${CUT}. Begin a new chat.` });
    this.element = make("div", { className: "context", hidden: true }, this.meter, this.text, this.warning);
  }

  /** Show {prompt, answer, limit, share, cut}, where it is known. */
  show(usage) {
    this.element.hidden = usage?.prompt == null;
    if (this.element.hidden) return;
    const { prompt, answer, limit, share, cut } = usage;
    const used = prompt + (answer ?? 0);
    const of = limit ? ` of ${number(limit)}` : "";
    this.text.textContent = `Context: ${number(used)}${of} tokens${of && `, ${Math.round(100 * share)} %`}`;
    this.meter.hidden = !limit;
    if (limit) Object.assign(this.meter, { max: limit, high: 0.8 * limit, value: used });
    this.warning.hidden = !cut;
  }
}
