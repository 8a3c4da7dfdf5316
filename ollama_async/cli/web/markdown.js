import DOMPurify from "./vendor/purify.js";

// What a model writes is not to be trusted: it may repeat what somebody put into a web page or a file. So HTML in it is
// shown as text, only these elements can come of its Markdown, and the page's policy runs no script but its own.
const ALLOWED = {
  ALLOWED_TAGS: [
    ..."p br hr h1 h2 h3 h4 h5 h6 ul ol li blockquote pre code strong em del a".split(" "),
    ..."table thead tbody tr th td".split(" "),
  ],
  ALLOWED_ATTR: ["href", "title", "start", "align"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_TRUSTED_TYPE: true,
};

// What takes longer to parse, or becomes more HTML, is shown as text.
const LONGEST_MS = 1000;
const LONGEST_START_MS = 30_000;
const LONGEST_HTML = 200_000;
// For so long the page does nothing else than show.
const SLICE_MS = 20;

DOMPurify.addHook("afterSanitizeAttributes", (element) => {
  if (element.tagName !== "A") return;
  element.setAttribute("target", "_blank");
  element.setAttribute("rel", "noopener noreferrer");
});

// The one script that a worker may run.
const SCRIPT = new URL("render.js", import.meta.url).href;
const policy = globalThis.trustedTypes?.createPolicy("render", { createScriptURL: () => SCRIPT });

let worker = null;
let last = Promise.resolve();

/** Have the worker do something; it fails, and is ended, when that takes too long. */
async function answer(message, longest) {
  let timer;
  try {
    return await new Promise((resolve, reject) => {
      timer = setTimeout(() => reject(new Error("it takes too long")), longest);
      if (worker === null) worker = new Worker(policy?.createScriptURL("") ?? SCRIPT, { type: "module" });
      worker.onmessage = ({ data }) => resolve(data);
      worker.onerror = worker.onmessageerror = (event) => reject(new Error(event.message ?? "it failed"));
      if (message) worker.postMessage(message);
    });
  } catch (error) {
    worker?.terminate();
    worker = null;
    throw error;
  } finally {
    clearTimeout(timer);
  }
}

/** Return the blocks of a text as {raw, html}, or null if it cannot be parsed. */
async function parse(text, shown) {
  if (worker === null) await answer(null, LONGEST_START_MS);
  return answer({ text, shown }, LONGEST_MS);
}

/** Comes when the first text can be parsed, or none ever can. */
export const loaded = (last = answer(null, LONGEST_START_MS).catch(() => {}));

/** Shows Markdown that grows. A block that stays the same is left alone, so that what is selected stays selected. */
export class Markdown {
  #shown = [];
  #text = null;
  #wanted = null;
  #drawing = null;

  /**
   * @param root where it is shown
   * @param follow is called before something changes, and returns what is called after it
   */
  constructor(root, follow) {
    this.root = root;
    this.follow = follow;
  }

  /**
   * Show a text, soon; when it is whole, links to what stands further down are found too.
   * The promise never fails: what cannot be shown as Markdown is shown as it is.
   */
  show(text, { whole = false } = {}) {
    this.#wanted = { text, whole };
    this.#drawing ??= this.#draw().finally(() => (this.#drawing = null));
    return this.#drawing;
  }

  async #draw() {
    while (this.#wanted) {
      const { text, whole } = this.#wanted;
      this.#wanted = null;
      try {
        // A text that could not be parsed is tried once more when it is whole.
        if (this.#text !== null && !whole) throw new Error("it is shown as text");
        last = last.catch(() => {}).then(() => parse(text, whole ? [] : this.#shown.map(({ raw }) => raw)));
        const blocks = await last;
        if (blocks === null) throw new Error("it is nested too deep");
        await this.#blocks(blocks);
      } catch {
        this.#plain(text);
      }
    }
  }

  async #blocks(blocks) {
    this.#text?.remove();
    this.#text = null;
    let [began, after] = [performance.now(), this.follow()];
    for (const [place, { raw, html }] of blocks.entries()) {
      const shown = (this.#shown[place] ??= { element: this.root.appendChild(document.createElement("div")) });
      if (html !== null && html !== shown.html) {
        const { element } = shown;
        element.classList.toggle("plain", html.length > LONGEST_HTML);
        if (html.length > LONGEST_HTML) element.textContent = raw;
        else element.innerHTML = DOMPurify.sanitize(html, ALLOWED);
        shown.html = html;
      }
      shown.raw = raw;
      if (performance.now() - began < SLICE_MS) continue;
      after();
      await new Promise((resolve) => setTimeout(resolve));
      [began, after] = [performance.now(), this.follow()];
    }
    this.#cut(blocks.length);
    after();
  }

  #plain(text) {
    const after = this.follow();
    this.#cut(0);
    if (this.#text === null) {
      this.#text = this.root.appendChild(document.createElement("div"));
      this.#text.className = "plain";
    }
    this.#text.textContent = text;
    after();
  }

  #cut(length) {
    for (const { element } of this.#shown.splice(length)) element.remove();
  }
}
