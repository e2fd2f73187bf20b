// Server-sent events out of bytes. Knows no API.

/** Takes bytes in pieces of any size, gives the data of the events that are whole. */
export class EventReader {
  #decoder = new TextDecoder();
  #rest = "";
  #data = [];

  feed(bytes) {
    this.#rest += this.#decoder.decode(bytes, { stream: true });
    const lines = this.#rest.split(/\r\n|\n|\r(?!$)/); // a CR at the end may be half of a CRLF
    this.#rest = lines.pop();
    return lines.flatMap((line) => this.#take(line));
  }

  #take(line) {
    if (line === "") {
      const events = this.#data.length ? [this.#data.join("\n")] : [];
      this.#data = [];
      return events;
    }
    const [, name, value] = /^([^:]*):? ?(.*)$/s.exec(line); // a comment has the empty name
    if (name === "data") this.#data.push(value);
    return [];
  }
}

/** The data of each event of a response's body. */
export async function* events(body) {
  const reader = body.getReader();
  const parser = new EventReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield* parser.feed(value);
  }
}
