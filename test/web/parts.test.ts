/** Parts of the page that need no browser: words, the tree of a conversation, files, streams, figures, traces. */
import { describe, expect, test } from "vitest";
import { Answer } from "../../src/web/answer.ts";
import { CHARTS } from "../../src/web/charts.ts";
import {
  append,
  change,
  DEFAULT_CONTROLS,
  emptyAnswer,
  messagesUpTo,
  newConversation,
  show,
  shownMessages,
  siblings,
  userMessage,
} from "../../src/web/conversation.ts";
import { readEvents } from "../../src/web/events.ts";
import { ExchangeError, readConversations, writeConversations } from "../../src/web/exchange.ts";
import { growth, quantile, readMetrics, total } from "../../src/web/metrics.ts";
import { languageOf } from "../../src/web/preferences.ts";
import { shortcutOf } from "../../src/web/shortcuts.ts";
import { finishedSentences } from "../../src/web/speech.ts";
import { Trace } from "../../src/web/trace.ts";
import { isRoutedExperts, readDelta, readFailure, readModels, readShape } from "../../src/web/wire.ts";
import { LANGUAGES, type Language, sayIn, WORDS } from "../../src/web/words.ts";

describe("words", () => {
  const languages = Object.keys(LANGUAGES) as Language[];

  test("each is there in every language, with the same values", () => {
    const values = (text: string) => [...text.matchAll(/\{\w+\}/g)].map(([name]) => name).sort();
    for (const [word, texts] of Object.entries(WORDS)) {
      for (const language of languages) {
        expect(texts[language].trim(), `${word} in ${language}`).not.toBe("");
        expect(values(texts[language]), `${word} in ${language}`).toEqual(values(texts.en));
      }
      // Chinese is Chinese, but for names that both write alike.
      if (texts.zh !== texts.en) expect(texts.zh, word).toMatch(/\p{Script=Han}/u);
    }
  });

  test("values are filled in as they are", () => {
    expect(sayIn("en")("branch", { index: 2, count: 3 })).toBe("Branch 2 of 3");
    expect(sayIn("zh")("failed", { reason: "$& {reason}" })).toBe("回答失败：$& {reason}");
  });

  test("the browser's first language that the page speaks", () => {
    expect(languageOf(["de-AT", "zh-Hant-TW", "en"])).toBe("zh");
    expect(languageOf(["fr"])).toBe("en");
    expect(languageOf(["constructor"])).toBe("en");
  });
});

function talk() {
  const empty = newConversation({ model: "m", system: "", controls: DEFAULT_CONTROLS });
  const question = userMessage(null, "First question\nwith a second line");
  const answer = emptyAnswer(question.id, "m");
  return { question, answer, conversation: append(append(empty, question), answer) };
}

describe("a conversation", () => {
  test("edited and repeated messages are branches beside each other; what follows each stays with it", () => {
    const { question, answer, conversation } = talk();
    const edited = userMessage(null, "Another");
    const branched = append(conversation, edited);
    expect(shownMessages(branched).map((m) => m.id)).toEqual([edited.id]);
    expect(siblings(branched, question).map((m) => m.id)).toEqual([question.id, edited.id]);
    expect(shownMessages(show(branched, question)).map((m) => m.id)).toEqual([question.id, answer.id]);
    expect(messagesUpTo(branched, answer.id).map((m) => m.id)).toEqual([question.id, answer.id]);
    expect(shownMessages(conversation)).toHaveLength(2); // the old one is as it was
  });

  test("is called after the first line that was said, cut at whole characters", () => {
    expect(talk().conversation.title).toBe("First question");
    const long = append(newConversation({ model: "", system: "", controls: DEFAULT_CONTROLS }), userMessage(null, "𠮷".repeat(100)));
    expect([...long.title]).toHaveLength(60);
    expect(long.title.endsWith("𠮷…")).toBe(true);
  });

  test("survives a file, under a new id", () => {
    const { conversation, answer, question } = talk();
    const figures = { promptTokens: 3, cachedTokens: 1, completionTokens: 2, firstTokenSeconds: 0.1, tokensPerSecond: 20 };
    const done = change(append(conversation, userMessage(null, "Beside")), answer.id, { content: "Yes", end: "stop", figures });
    const [read] = readConversations(writeConversations([show(done, question)]));
    expect(read.id).not.toBe(done.id);
    expect({ ...read, id: done.id }).toEqual(show(done, question));
    expect(shownMessages(read).map((m) => m.content)).toEqual([question.content, "Yes"]);
  });

  test("what is not such a file is refused with the place and what was seen", () => {
    const good = JSON.parse(writeConversations([talk().conversation]));
    const broken = (edit: (file: typeof good) => void) => {
      const file = structuredClone(good);
      edit(file);
      return () => readConversations(JSON.stringify(file));
    };
    expect(() => readConversations("{")).toThrow(ExchangeError);
    expect(() => readConversations("[]")).toThrow("[] is not an object");
    expect(broken((f) => (f.format = "x"))).toThrow('format: "x" is not "mixtape-conversations"');
    expect(broken((f) => (f.conversations[0].messages[0].role = "system"))).toThrow(
      'conversations[0].messages[0].role: "system" is not one of user, assistant',
    );
    expect(broken((f) => (f.conversations[0].messages[0].content = { a: 1 }))).toThrow("is not a string");
    expect(broken((f) => f.conversations[0].messages.reverse())).toThrow("not the id of a message before it");
    expect(broken((f) => f.conversations[0].messages.push(f.conversations[0].messages[0]))).toThrow("used twice");
    expect(broken((f) => (f.conversations[0].controls.temperature = "hot"))).toThrow('controls.temperature: "hot" is not a number');
  });
});

async function eventsOf(...pieces: string[]): Promise<string[]> {
  const bytes = new TextEncoder();
  const stream = new ReadableStream<Uint8Array>({
    start(controller) {
      for (const piece of pieces) controller.enqueue(bytes.encode(piece));
      controller.close();
    },
  });
  const events: string[] = [];
  for await (const data of readEvents(stream)) events.push(data);
  return events;
}

describe("a stream of events", () => {
  test("may be cut anywhere, and end its lines in any way", async () => {
    const text = 'data: {"a":"é"}\r\n\r\n: a comment\nevent: x\ndata: one\ndata:two\n\ndata: [DONE]\n\n';
    const wanted = ['{"a":"é"}', "one\ntwo", "[DONE]"];
    expect(await eventsOf(text)).toEqual(wanted);
    expect(await eventsOf(...text)).toEqual(wanted);
  });

  test("an event that it breaks off in is not delivered", async () => {
    expect(await eventsOf("data: whole\n\ndata: half\n")).toEqual(["whole"]);
  });
});

describe("what the server sends", () => {
  const token = {
    token: 1,
    text: "a",
    layers: [1, 2],
    experts: [
      [0, 3],
      [5, 1],
    ],
    weights: [
      [0.6, 0.4],
      [1, 0],
    ],
  };

  test("pieces of an answer", () => {
    const choice = { delta: { content: "Hi", reasoning_content: "hm", routing: [token, { text: "b" }] }, finish_reason: "length" };
    const call = { index: 0, id: "c", function: { name: "f", arguments: '{"x":' } };
    expect(readDelta({ choices: [{ ...choice, delta: { ...choice.delta, tool_calls: [call, 7] } }], usage: null })).toEqual({
      content: "Hi",
      reasoning: "hm",
      routing: [token],
      toolCalls: [{ index: 0, name: "f", arguments: '{"x":' }],
      finish: "length",
      usage: null,
    });
    expect(readDelta({ choices: [], usage: { prompt_tokens: 9, completion_tokens: 2 } })?.usage).toEqual({
      promptTokens: 9,
      cachedTokens: 0,
      completionTokens: 2,
    });
    for (const wrong of [null, 3, "x", [], { error: {} }]) expect(readDelta(wrong)).toBe(null);
  });

  test("routing of one shape only", () => {
    expect(isRoutedExperts(token)).toBe(true);
    expect(isRoutedExperts({ ...token, weights: [[0.6, 0.4]] })).toBe(false);
    expect(isRoutedExperts({ ...token, experts: [[0, 3], [5]] })).toBe(false);
    expect(
      isRoutedExperts({
        ...token,
        experts: [
          [0, -3],
          [5, 1],
        ],
      }),
    ).toBe(false);
    expect(isRoutedExperts({ ...token, text: {} })).toBe(false);
  });

  test("models, shapes and errors", () => {
    expect(readModels({ data: [{ id: "a" }, { id: 3 }, null, { id: "" }, { id: "b", demo: true }, { id: "c", demo: "yes" }] })).toEqual([
      { id: "a", demo: false },
      { id: "b", demo: true },
      { id: "c", demo: false },
    ]);
    expect(readModels(undefined)).toEqual([]);
    expect(
      readShape({
        layers: [
          { layer: 1, load: [0, 1, 0] },
          { layer: 2, load: [1, 0, 0] },
        ],
      }),
    ).toEqual({ layers: [1, 2], experts: 3 });
    expect(readShape({ layers: [] })).toBe(null);
    expect(readFailure({ error: { message: "no", code: 4 } })).toEqual({ message: "no", code: null });
    expect(readFailure({ message: "no" })).toBe(null);
  });

  test("an answer is put together and timed", () => {
    let now = 1000;
    const answer = new Answer(() => now);
    const piece = { content: "", reasoning: "", toolCalls: [], routing: [], finish: null, usage: null };
    answer.take(piece);
    expect(answer.parts.figures).toBe(null);
    now = 1250;
    answer.take({ ...piece, content: "a", routing: [token] });
    now = 2250;
    answer.take({ ...piece, content: "b", toolCalls: [{ index: 0, name: "f", arguments: "{" }] });
    answer.take({
      ...piece,
      toolCalls: [
        { index: 0, name: null, arguments: "}" },
        { index: 9, name: "gap", arguments: "" },
      ],
    });
    answer.take({ ...piece, finish: "length", usage: { promptTokens: 8, cachedTokens: 4, completionTokens: 11 } });
    expect(answer.parts).toEqual({
      content: "ab",
      reasoning: "",
      toolCalls: [{ name: "f", arguments: "{}" }],
      figures: { promptTokens: 8, cachedTokens: 4, completionTokens: 11, firstTokenSeconds: 0.25, tokensPerSecond: 10 },
    });
    expect(answer.end).toBe("length");
    expect(answer.trace?.length).toBe(1);
  });
});

describe("a trace", () => {
  const token = (text: string, a: number, b: number) => ({
    text,
    layers: [3, 4],
    experts: [
      [a, b],
      [b, a],
    ],
    weights: [
      [0.25, 0.75],
      [0.9, 0.1],
    ],
  });

  test("knows each token's experts, the heaviest first, and how often each was used", () => {
    const trace = Trace.like(token("", 0, 0));
    for (let i = 0; i < 100; i++) expect(trace.push(token(String(i), i % 8, 8))).toBe(true);
    expect(trace.choices(9)).toEqual([
      [
        { expert: 8, weight: 0.75 },
        { expert: 1, weight: 0.25 },
      ],
      [
        { expert: 8, weight: expect.closeTo(0.9) },
        { expert: 1, weight: expect.closeTo(0.1) },
      ],
    ]);
    expect(trace.leastExperts).toBe(9);
    expect([...trace.load(9)].slice(0, 9)).toEqual([13, 13, 13, 13, 12, 12, 12, 12, 100]);
    expect([...trace.load(9, 1)].slice(9)).toEqual([1, 0, 0, 0, 0, 0, 0, 0, 1]);
    expect(new Trace(trace.stored()).choices(99)).toEqual(trace.choices(99));
  });

  test("refuses a token of another shape", () => {
    const trace = Trace.like(token("", 0, 0));
    expect(trace.push({ text: "x", layers: [3], experts: [[1, 2]], weights: [[1, 0]] })).toBe(false);
    expect(trace.length).toBe(0);
  });
});

describe("figures", () => {
  const text = (n: number) => `# HELP m help
# TYPE m counter
m_total{model="a \\"b\\"",kind="x"} ${n}
m_total{model="c"} 1e1
lat_bucket{le="0.1",model="a"} ${n}
lat_bucket{le="1",model="a"} ${n * 2}
lat_bucket{le="+Inf",model="a"} ${n * 2}
plain 3 1700000000000
not a line at all {`;

  test("Prometheus' text", () => {
    const samples = readMetrics(text(4));
    expect(samples.get("m_total")).toEqual([
      { labels: { model: 'a "b"', kind: "x" }, value: 4 },
      { labels: { model: "c" }, value: 10 },
    ]);
    expect(total(samples, "m_total")).toBe(14);
    expect(total(samples, "m_total", { kind: "x" })).toBe(4);
    expect(total(samples, "plain")).toBe(3);
    expect(total(samples, "absent")).toBe(0);
  });

  test("quantiles of what happened between two readings", () => {
    const [before, now] = [readMetrics(text(10)), readMetrics(text(20))];
    expect(quantile(before, now, "lat", 0.5)).toBeCloseTo(0.1);
    expect(quantile(before, now, "lat", 0.25)).toBeCloseTo(0.05);
    expect(quantile(before, now, "lat", 0.75)).toBeCloseTo(0.55);
    expect(quantile(now, now, "lat", 0.5)).toBe(null);
    expect(quantile(before, now, "absent", 0.5)).toBe(null);
    expect(growth(5, 3)).toBe(3); // the server began anew
  });

  test("every chart has nothing to tell of nothing", () => {
    const nothing = { at: 0, samples: readMetrics("") };
    for (const { series } of CHARTS) for (const { of } of series) expect(of(nothing, { ...nothing, at: 2 }) ?? 0).toBe(0);
  });
});

test("a screen reader is told whole sentences, each once", () => {
  const text = "One. Two is 3.14! 三。Four";
  const told: string[] = [];
  let at = 0;
  for (let length = 1; length <= text.length; length++) {
    const next = finishedSentences(text.slice(0, length), at);
    at = next.told;
    if (next.sentences) told.push(next.sentences);
  }
  expect(told).toEqual(["One.", "Two is 3.14!", "三。"]);
});

test("shortcuts go by the key's place, and leave composing and other chords alone", () => {
  const key = { key: "µ", code: "KeyM", altKey: true, ctrlKey: false, metaKey: false, shiftKey: false, isComposing: false };
  expect(shortcutOf(key)).toBe("message");
  expect(shortcutOf({ ...key, ctrlKey: true })).toBe(null);
  expect(shortcutOf({ ...key, altKey: false })).toBe(null);
  expect(shortcutOf({ ...key, altKey: false, key: "Escape" })).toBe("stop");
  expect(shortcutOf({ ...key, altKey: false, key: "Escape", isComposing: true })).toBe(null);
});
