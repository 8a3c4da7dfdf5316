// Runs beside the page, as a worker: whatever a text does to the parser, the page goes on, and can end this.
import { Marked } from "./vendor/marked.js";

const escaped = (text) => text.replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);

// What a model writes is not to be trusted. HTML in it is shown as text; the page sanitises what comes of the rest.
const marked = new Marked({
  renderer: {
    html: ({ text, block }) => (block ? `<p>${escaped(text)}</p>` : escaped(text)),
    // A picture would be fetched from wherever the model says, with what the model puts into its address.
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "\u2611 " : "\u2610 "),
  },
});

/** Return the blocks of a text as {raw, html}; of those that are shown already, without their HTML. */
function blocks(text, shown) {
  const found = marked.lexer(text).filter(({ type }) => type !== "space");
  return found.map((block, place) => ({
    raw: block.raw,
    html: shown[place] === block.raw ? null : marked.parser([block]),
  }));
}

onmessage = ({ data: { text, shown } }) => {
  let made = null;
  try {
    made = blocks(text, shown);
  } catch {
    // It is nested too deep for the parser: the page shows it as text.
  }
  postMessage(made);
};

postMessage("ready");
