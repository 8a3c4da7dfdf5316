/** Yield the server-sent events of a body, as {name, data}. Whoever leaves it early leaves the body's sender too. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let name = "";
  let data = [];
  try {
    for await (const line of lines(reader)) {
      if (line === "") {
        if (data.length) yield { name: name || "message", data: data.join("\n") };
        name = "";
        data = [];
        continue;
      }
      const [, field, text] = /^([^:]*):? ?(.*)$/s.exec(line);
      if (field === "event") name = text;
      if (field === "data") data.push(text);
    }
    // An event whose blank line has not come is dropped, as the standard has it.
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Yield the lines. What came of one is not looked at again when more of it comes: it may be long. */
async function* lines(reader) {
  let begun = [];
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    let text = held + value;
    // A carriage return at the very end may be the first half of a line's end.
    held = text.endsWith("\r") ? "\r" : "";
    if (held) text = text.slice(0, -1);
    const found = text.split(/\r\n|\n|\r/);
    const rest = found.pop();
    for (const line of found) {
      yield begun.join("") + line;
      begun = [];
    }
    begun.push(rest);
  }
}
