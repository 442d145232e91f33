/** Reads server-sent events from a stream that may be split anywhere. Does not interpret their data. */

/** Yields the data of each event, its lines joined with newlines. An event that the end of the stream cuts off is dropped. */
export async function* readEvents(body: ReadableStream<Uint8Array>): AsyncGenerator<string, void, undefined> {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let held = "";
  let data: string[] = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      held += decoder.decode(value, { stream: true });
      // A \r at the end of a chunk may be the first half of \r\n, so it waits for the next chunk.
      const lines = held.split(/\r\n|\n|\r(?!$)/);
      held = lines.pop() ?? "";
      for (const line of lines) {
        if (line === "") {
          if (data.length > 0) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
      }
    }
  } finally {
    // If the consumer stopped early, this closes the connection, and the server stops generating.
    await reader.cancel().catch(() => {});
  }
}
