// @ts-check
/**
 * Watches durable answers from a page: starts one, attaches to it again whenever the connection breaks, and stops it.
 *
 *     import { Answers } from "./answers.js";
 *     const answers = new Answers("/answers");
 *     const answer = answers.start("/chat", { text: "Why is the sky blue?" });
 *     for await (const { name, data } of answer) {
 *       if (name === "chunk") page.append(data.message.content ?? "");
 *     }
 *
 * Every event comes once, in order. It needs no other file and no build step.
 *
 * @module
 */

/**
 * What comes of an answer: `open` first, a `chunk` for each chunk of the model, `end` last.
 *
 * @typedef {object} AnswerEvent
 * @property {string} name
 * @property {number | null} number Where to attach behind it; `null` for an `end` that other viewers do not get.
 * @property {any} data
 */

/**
 * An answer in the server's list.
 *
 * @typedef {object} Listed
 * @property {string} id
 * @property {"running" | "silent" | "ended"} state
 * @property {number} begun In seconds since 1970.
 */

/**
 * What an answer's connection does: it is made, brings events, was lost and is made again after a pause, or is not
 * needed any more.
 *
 * @typedef {"connecting" | "receiving" | "waiting" | "over"} State
 */

/**
 * @typedef {object} Options
 * @property {RequestInit} [request] What each request has: `headers`, `credentials`.
 * @property {number} [stall] After how many milliseconds without a sign of life a connection is given up. The server
 *   sends a heartbeat every 15 s.
 * @property {number} [patience] After how many milliseconds without a connection an answer is given up.
 */

/** What the server, or something before it, refuses; trying again would change nothing. */
export class AnswerError extends Error {
  /**
   * @param {string} message
   * @param {number} status Of HTTP; 0 if it came within an answer, or nothing answered.
   * @param {string | null} code As in the table of the routes: `unknown`, `in_use`, `gap`, ...
   */
  constructor(message, status, code) {
    super(message);
    this.name = "AnswerError";
    this.status = status;
    this.code = code;
  }
}

/** A connection that cannot be made now, or was lost: another one may do. */
class Broken extends Error {
  /** @param {string} message @param {number} [pause] How many milliseconds the server asks to wait. */
  constructor(message, pause = 0) {
    super(message);
    this.pause = pause;
  }
}

const JSON_BODY = { "Content-Type": "application/json" };
const STALL = 45_000;
const FIRST_PAUSE = 250;
const LONGEST_PAUSE = 15_000;
/** A server that is busy or restarted, or a proxy that does not reach it. */
const PASSING = new Set([408, 425, 429, 502, 503, 504]);
/** What tells that the network, or the page, was away or is back. The third one bubbles up from the document. */
const WAKING = ["online", "offline", "visibilitychange", "pageshow"];
/** How often a server may say that it knows nothing of an answer whose question may still be on its way to it. */
const UNKNOWN_AT_FIRST = 3;
/** How often a Stop is sent anew when nothing answers. */
const STOPS = 8;

/** Return an id that nobody can guess: whoever knows it, and its owner, may stop the answer. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(24));
  return btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_");
}

/** The durable answers of a server. */
export class Answers {
  /**
   * @param {string} url Of `list_route()`, `attach_route()` and `stop_route()`, which have the same path here.
   * @param {Options} [options]
   */
  constructor(url, { request = {}, stall = STALL, patience = Infinity } = {}) {
    this.url = url;
    this.request = request;
    this.stall = stall;
    this.patience = patience;
  }

  /**
   * Ask a question: it is sent when the answer is iterated, once and never again.
   *
   * @param {string} url Of the route that begins the answer.
   * @param {unknown} question Sent as JSON.
   * @param {{ id?: string }} [options] The answer's id, where it has to be known before.
   */
  start(url, question, { id = newId() } = {}) {
    return new Answer(this, id, 0, { url, body: JSON.stringify(question) });
  }

  /**
   * Watch an answer that was begun before, here or elsewhere.
   *
   * @param {string} id
   * @param {{ after?: number }} [options] The number of the event to go on after; 0 for all of it.
   */
  attach(id, { after = 0 } = {}) {
    return new Answer(this, id, after, null);
  }

  /**
   * Return the user's answers that have not ended, the oldest first: what to attach to after a reload.
   *
   * @returns {Promise<Listed[]>}
   */
  async running() {
    const response = await fetch(this.url, this.requested({ signal: AbortSignal.timeout(this.stall) }));
    if (!response.ok) throw (await refusal(response)).error;
    return (await response.json()).filter((/** @type {Listed} */ { state }) => state !== "ended");
  }

  /**
   * Return what a request has: what all have, and its own.
   *
   * @param {RequestInit} own
   * @param {Record<string, string>} [headers]
   * @returns {RequestInit}
   */
  requested(own, headers = {}) {
    const all = new Headers(this.request.headers);
    for (const [name, value] of Object.entries(headers)) all.set(name, value);
    return { cache: "no-store", ...this.request, ...own, headers: all };
  }
}

/**
 * An answer that the page watches: `for await (const event of answer)`, once. Leaving the loop detaches the page, and
 * the answer goes on.
 */
export class Answer {
  /** Called when the state has changed. @type {((state: State) => void) | null} */
  onstate = null;
  /** @type {State} */
  state = "connecting";
  #answers;
  /** Sent by the first connection; the others attach. @type {{ url: string, body: string } | null} */
  #question;
  /** The question was sent, and the server has not said anything since. */
  #unsure = false;
  #unknown = 0;
  /** @type {AbortController | null} */
  #connection = null;
  /** When the server was last heard of. */
  #heard = Date.now();
  /** Ends the pause before the next connection. */
  #resume = () => {};

  /**
   * Use `start()` or `attach()`.
   *
   * @param {Answers} answers
   * @param {string} id
   * @param {number} after
   * @param {{ url: string, body: string } | null} question
   */
  constructor(answers, id, after, question) {
    this.id = id;
    /** The number of the last event that came. */
    this.after = after;
    this.#answers = answers;
    this.#question = question;
  }

  /**
   * Stop the answer, for all who watch it. From now on the page does not watch it, and connects to it no more.
   *
   * @param {string} [reason] The `reason` in the answer's `end`.
   * @returns {Promise<boolean>} Whether the server stopped it: not if it had ended, or the server is away.
   */
  async stop(reason) {
    // First: a browser has few connections to a server, and this one may be what the Stop needs.
    this.detach();
    const body = JSON.stringify(reason === undefined ? {} : { reason });
    for (let failures = 0; failures < STOPS; failures += 1) {
      // It is sent even if the page is left meanwhile.
      const own = { method: "POST", body, keepalive: true, signal: AbortSignal.timeout(this.#answers.stall) };
      try {
        const response = await fetch(this.#url, this.#answers.requested(own, JSON_BODY));
        if (!PASSING.has(response.status)) return response.status === 200;
      } catch {
        // Offline, or the server is restarted.
      }
      await new Promise((resolve) => setTimeout(resolve, backOff(failures)));
    }
    return false;
  }

  /** Watch it no more; the answer goes on. */
  detach() {
    this.#tell("over");
    this.#connection?.abort();
    this.#resume();
  }

  /** @returns {AsyncGenerator<AnswerEvent, void, void>} */
  async *[Symbol.asyncIterator]() {
    const wake = (/** @type {Event} */ event) => this.#wake(event);
    for (const type of WAKING) addEventListener(type, wake);
    try {
      yield* this.#events();
    } finally {
      for (const type of WAKING) removeEventListener(type, wake);
      this.detach();
    }
  }

  /** Connect, again and again, until the answer has ended. @returns {AsyncGenerator<AnswerEvent, void, void>} */
  async *#events() {
    let [failures, lost] = [0, 0];
    while (!this.#isOver()) {
      const began = Date.now();
      try {
        for await (const event of this.#connect()) {
          [failures, lost] = [0, 0];
          yield event;
          if (event.name === "end") return;
        }
        return;
      } catch (error) {
        if (this.#isOver()) return;
        const now = Date.now();
        lost ||= now;
        if (!(error instanceof Broken) || now - lost >= this.#answers.patience) throw this.#giveUp(error);
        // One that has held for long is not one failure more.
        if (now - began > LONGEST_PAUSE) failures = 0;
        this.#tell("waiting");
        await this.#pause(Math.max(backOff(failures), error.pause));
        failures += 1;
      }
    }
  }

  /** @param {unknown} error */
  #giveUp(error) {
    // The question may be on its way to the server: then its answer is not for nobody.
    if (this.#unsure) void this.stop("its page has given up");
    return error instanceof Broken ? new AnswerError(error.message, 0, "away") : error;
  }

  /** Make one connection, and yield what it brings. @returns {AsyncGenerator<AnswerEvent, void, void>} */
  async *#connect() {
    const connection = (this.#connection = new AbortController());
    try {
      this.#tell("connecting");
      const body = await this.#open(connection);
      if (body === null) return;
      this.#tell("receiving");
      const reader = body.pipeThrough(new TextDecoderStream()).getReader();
      for await (const { id, name, data } of parse(() => this.#within(connection, () => reader.read()))) {
        if (this.#isOver()) return;
        const event = this.#next(id, name, data);
        if (event !== null) yield event;
      }
      throw new Broken("the connection ended before the answer");
    } finally {
      connection.abort();
    }
  }

  /**
   * Send a request, and return the body of its response; `null` if the answer has ended.
   *
   * @param {AbortController} connection
   */
  async #open(connection) {
    const [question, { signal }] = [this.#question, connection];
    this.#question = null;
    this.#unsure ||= question !== null;
    const response = await this.#within(connection, () => {
      if (question === null) return fetch(`${this.#url}?after=${this.after}`, this.#answers.requested({ signal }));
      const own = { method: "POST", body: question.body, signal };
      return fetch(question.url, this.#answers.requested(own, { ...JSON_BODY, "X-Stream-Id": this.id }));
    });
    const kind = response.headers.get("Content-Type");
    const events = response.ok && kind?.startsWith("text/event-stream");
    if (events || response.status === 204) {
      this.#unsure = false;
      return events ? response.body : null; // browsers do not agree whether a 204 has a body
    }
    const { error, ours } = await this.#within(connection, () => refusal(response));
    // A proxy that did not wait until the model was loaded has left an answer that goes on.
    const passing = PASSING.has(error.status) && !(ours && question !== null);
    const early = this.#unsure && error.status === 404 && question === null && (this.#unknown += 1) < UNKNOWN_AT_FIRST;
    if (passing || early) throw new Broken(error.message, 1000 * Number(response.headers.get("Retry-After") ?? 0) || 0);
    if (question !== null) this.#unsure = false;
    throw error;
  }

  /**
   * Return an event, `null` if it came before.
   *
   * @param {string} id
   * @param {string} name
   * @param {string} text
   * @returns {AnswerEvent | null}
   */
  #next(id, name, text) {
    const data = JSON.parse(text);
    if (name === "error") throw new AnswerError(data.error, 0, data.code);
    if (id === "" && name === "end") return { name, number: null, data };
    const number = Number(id);
    if (id !== "" && number <= this.after) return null;
    if (number !== this.after + 1) throw new AnswerError(`event ${id} came behind event ${this.after}`, 0, "gap");
    this.after = number;
    return { name, number, data };
  }

  /**
   * Wait for something from the server, for so long.
   *
   * @template T
   * @param {AbortController} connection
   * @param {() => Promise<T>} step
   */
  async #within(connection, step) {
    const silent = () => connection.abort(new Broken("the server was silent for too long"));
    const timer = setTimeout(silent, this.#answers.stall);
    try {
      const got = await step();
      this.#heard = Date.now();
      return got;
    } catch (error) {
      throw connection.signal.aborted ? connection.signal.reason : new Broken(String(error));
    } finally {
      clearTimeout(timer);
    }
  }

  /** @param {number} pause */
  async #pause(pause) {
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, pause);
      this.#resume = () => {
        clearTimeout(timer);
        resolve(undefined);
      };
    });
  }

  /**
   * Connect at once when the network or the page is back: a connection of before may be dead, and does not tell. So
   * when the network goes, too: what is on this machine can still be reached.
   *
   * @param {Event} event
   */
  #wake(event) {
    const { type, persisted } = /** @type {PageTransitionEvent} */ (event);
    if (type === "visibilitychange" && document.hidden) return;
    const silent = Date.now() - this.#heard > this.#answers.stall / 2;
    const network = type === "online" || type === "offline";
    if (network || persisted || silent) this.#connection?.abort(new Broken("the network was away"));
    this.#resume();
  }

  /** @param {State} state */
  #tell(state) {
    if (this.#isOver() || this.state === state) return;
    this.state = state;
    this.onstate?.(state);
  }

  #isOver() {
    return this.state === "over";
  }

  get #url() {
    return `${this.#answers.url}/${encodeURIComponent(this.id)}`;
  }
}

/** Return how many milliseconds to wait after so many failures: others wait as well, and should not come together. */
function backOff(/** @type {number} */ failures) {
  return Math.min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** failures) * (0.5 + Math.random() / 2);
}

/** Read what a refusal says, and whether it was said by who serves answers. */
async function refusal(/** @type {Response} */ response) {
  const body = await response.json().catch(() => null);
  const said = [body?.error, body?.detail].find((text) => typeof text === "string");
  const text = said ?? `the server answered with status ${response.status}`;
  return { error: new AnswerError(text, response.status, body?.code ?? null), ours: said !== undefined };
}

/**
 * Yield the events of a body of server-sent events.
 *
 * @param {() => Promise<ReadableStreamReadResult<string>>} read
 */
async function* parse(read) {
  let [id, name] = ["", ""];
  /** @type {string[]} */
  let data = [];
  for await (const line of lines(read)) {
    if (line === "") {
      if (data.length) yield { id, name: name || "message", data: data.join("\n") };
      [id, name, data] = ["", "", []];
      continue;
    }
    const [, field, text] = /** @type {RegExpExecArray} */ (/^([^:]*):? ?(.*)$/s.exec(line));
    if (field === "id") id = text;
    if (field === "event") name = text;
    if (field === "data") data.push(text);
  }
  // An event whose blank line has not come is dropped, as the standard has it.
}

/**
 * Yield the lines. What came of one is not looked at again when more of it comes: it may be long.
 *
 * @param {() => Promise<ReadableStreamReadResult<string>>} read
 */
async function* lines(read) {
  /** @type {string[]} */
  let begun = [];
  let held = "";
  for (;;) {
    const { value, done } = await read();
    if (done) return;
    let text = held + value;
    // A carriage return at the very end may be the first half of a line's end.
    held = text.endsWith("\r") ? "\r" : "";
    if (held) text = text.slice(0, -1);
    const found = text.split(/\r\n|\n|\r/);
    const rest = /** @type {string} */ (found.pop());
    for (const line of found) {
      yield begun.join("") + line;
      begun = [];
    }
    begun.push(rest);
  }
}
