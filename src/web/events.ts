/** Reads a stream of server-sent events as it arrives, in whatever pieces. Knows not what the events say. */

/** The data of each event, its lines joined. Ends with the stream; an event that the stream breaks off in is not delivered. */
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
      // A line end that the piece stops in the middle of (\r, then \n) waits for the rest.
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
    // Where the reader stopped early, the connection is closed and the server stops computing.
    await reader.cancel().catch(() => {});
  }
}
