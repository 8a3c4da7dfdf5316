import { Marked } from "./vendor/marked.js";
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

DOMPurify.addHook("afterSanitizeAttributes", (element) => {
  if (element.tagName !== "A") return;
  element.setAttribute("target", "_blank");
  element.setAttribute("rel", "noopener noreferrer");
});

const escaped = (text) => text.replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);

const marked = new Marked({
  renderer: {
    html: ({ text, block }) => (block ? `<p>${escaped(text)}</p>` : escaped(text)),
    // A picture would be fetched from wherever the model says, with what the model puts into its address.
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "\u2611 " : "\u2610 "),
  },
});

/** Shows Markdown that grows. A block that stays the same is left alone, so that what is selected stays selected. */
export class Markdown {
  #shown = [];

  constructor(root) {
    this.root = root;
  }

  /** Show a text; when it is whole, links to what stands further down are found too. */
  show(text, { whole = false } = {}) {
    if (whole) this.#cut(0);
    const blocks = marked.lexer(text).filter(({ type }) => type !== "space");
    blocks.forEach((block, place) => {
      if (this.#shown[place]?.raw === block.raw) return;
      this.#shown[place] ??= { element: this.root.appendChild(document.createElement("div")) };
      const { element } = this.#shown[place];
      element.innerHTML = DOMPurify.sanitize(marked.parser([block]), ALLOWED);
      this.#shown[place].raw = block.raw;
    });
    this.#cut(blocks.length);
  }

  #cut(length) {
    for (const { element } of this.#shown.splice(length)) element.remove();
  }
}
