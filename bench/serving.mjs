/**
 * The server under load: many streams at once, some of them compared with the answer that the same question gets alone; more
 * requests than the server admits; the second turn of a long conversation; long texts and hard patterns; and models without a
 * tokenizer on the engine alone. Server and clients share the machine.
 *
 *   npm run build && node bench/serving.mjs [--users 1,8,32,256] [--new-tokens 100] [--rounds 3] [--engine MODEL] [--seed 1] [--json]
 *
 * What keeps rounds honest: every question is new, of each user in each round, warm-up included, so that no prefix cache answers
 * in place of the model. Questions are asked alone after the crowd has been timed. Where HTTP is compared with the engine alone,
 * each has its own cache and gets the same questions. Only the second turn of a conversation is meant to hit the cache.
 */
import { spawn } from "node:child_process";
import { Agent, request } from "node:http";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import autocannon from "autocannon";
import { AutoModelForCausalLM, AutoTokenizer } from "../dist/index.js";
import { median, quantile } from "./figures.mjs";
import { freshPrompts } from "./prompts.mjs";

const { values: flags } = parseArgs({
  options: {
    users: { type: "string", default: "1,8,32,256" },
    "new-tokens": { type: "string", default: "100" },
    rounds: { type: "string", default: "3" },
    engine: { type: "string" },
    threads: { type: "string", default: "2" },
    seed: { type: "string", default: "1" },
    json: { type: "boolean", default: false },
  },
});
const newTokens = Number(flags["new-tokens"]);
const rounds = Number(flags.rounds);
const cli = fileURLToPath(new URL("../bin/mixtape.js", import.meta.url));
const lateness = new URL("lateness.mjs", import.meta.url).href;
const prompts = freshPrompts({ seed: Number(flags.seed) });
const results = {};

/** Starts a server whose metrics and timer lateness can be read. */
async function serve(args = []) {
  const started = [cli, "serve", "--port", "0", "--log-level", "error", "--threads", flags.threads, ...args];
  const child = spawn(process.execPath, ["--import", lateness, ...started], { stdio: ["ignore", "ignore", "pipe", "ipc"] });
  let said = "";
  await new Promise((resolve, reject) => {
    child.stderr.setEncoding("utf8").on("data", (part) => {
      said += part;
      if (/ at http\S+ /.test(said)) resolve();
    });
    child.once("exit", (code) => reject(new Error(`the server ended with ${code}: ${said}`)));
  });
  const url = / at (http\S+) /.exec(said)[1];
  return {
    url,
    stop: () => child.kill("SIGKILL"),
    figures: async () => parse(await (await fetch(`${url}/metrics`)).text()),
    /** How late the server's timers were since it was last asked, in milliseconds. */
    lateness: () =>
      new Promise((resolve) => {
        child.once("message", resolve);
        child.send("lateness");
      }),
  };
}

function parse(text) {
  return new Map([...text.matchAll(/^([a-z_0-9]+)(?:\{[^}]*\})? (\S+)$/gm)].map(([, name, value]) => [name, Number(value)]));
}

/** How many streams of a crowd are compared with their answers alone. */
const COMPARED = 8;

/** This many new questions. */
const questions = (count) => Array.from({ length: count }, () => `${prompts.text(6)}: tell me about them.`);

const bodyOf = (content, more = {}) => ({
  model: "default",
  messages: Array.isArray(content) ? content : [{ role: "user", content }],
  temperature: 0,
  max_tokens: newTokens,
  stream: true,
  logit_bias: { 2: -100, 5: -100 }, // no answer ends early
  ...more,
});

/** One streamed answer: its text, when each piece arrived, and the status. */
async function ask(url, content, more = {}) {
  const start = performance.now();
  const response = await fetch(`${url}/v1/chat/completions`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(bodyOf(content, more)),
  });
  const times = [];
  let [text, held] = ["", ""];
  if (response.status !== 200) await response.arrayBuffer();
  else
    for await (const part of response.body.pipeThrough(new TextDecoderStream())) {
      held += part;
      const events = held.split("\n\n");
      held = events.pop();
      for (const event of events) {
        const piece = /"content":"((?:[^"\\]|\\.)+)"/.exec(event)?.[1];
        if (piece === undefined) continue;
        text += piece;
        times.push(performance.now() - start);
      }
    }
  return { status: response.status, text, times, ms: performance.now() - start, retryAfter: response.headers.get("retry-after") };
}

/** This many streams at once, then the first of their questions again, one at a time. */
async function streams(server, users) {
  const asked = questions(users);
  const before = await server.figures();
  await server.lateness();
  const start = performance.now();
  const answers = await Promise.all(asked.map((content) => ask(server.url, content)));
  const seconds = (performance.now() - start) / 1000;
  const late = await server.lateness();
  const after = await server.figures();
  const compared = answers.slice(0, COMPARED);
  let same = 0;
  for (const [i, { text }] of compared.entries()) if ((await ask(server.url, asked[i])).text === text) same++;
  const inSteps = after.get("mixtape_step_seconds_sum") - before.get("mixtape_step_seconds_sum");
  return {
    tokensPerSecond: (users * newTokens) / seconds,
    same,
    compared: compared.length,
    first: answers.map((a) => a.times[0]),
    gaps: answers.flatMap((a) => a.times.slice(1).map((t, i) => t - a.times[i])),
    outsideSteps: 1 - inSteps / seconds,
    late,
  };
}

/** One row of the table: the rounds with this many streams. */
function summary(users, each) {
  return {
    users,
    tokensPerSecond: median(each.map((e) => e.tokensPerSecond)),
    sameAsAlone: `${each.reduce((n, e) => n + e.same, 0)} of ${each.reduce((n, e) => n + e.compared, 0)}`,
    firstMs: {
      median: median(each.flatMap((e) => e.first)),
      p99: quantile(
        each.flatMap((e) => e.first),
        0.99,
      ),
    },
    gapMs: {
      median: median(each.flatMap((e) => e.gaps)),
      p99: quantile(
        each.flatMap((e) => e.gaps),
        0.99,
      ),
    },
    outsideSteps: median(each.map((e) => e.outsideSteps)),
    lateMs: { p99: median(each.map((e) => e.late.p99)), max: Math.max(...each.map((e) => e.late.max)) },
  };
}

async function crowd() {
  const server = await serve();
  try {
    for (const content of questions(16)) await ask(server.url, content); // warms up
    const levels = flags.users.split(",").map(Number);
    const each = new Map(levels.map((users) => [users, []]));
    for (let round = 0; round < rounds; round++) for (const users of levels) each.get(users).push(await streams(server, users));
    return [...each].map(([users, all]) => summary(users, all));
  } finally {
    server.stop();
  }
}

/** Four times as many requests as the server admits, over open connections: the server's own work, without the cost of connecting. */
async function overload() {
  const room = 32;
  const server = await serve(["--max-in-progress", String(room)]);
  const agent = new Agent({ keepAlive: true });
  try {
    const wave = (n) => Promise.all(questions(n).map((content) => drink(server.url, content, agent)));
    await wave(4 * room);
    const [calm, full] = [[], []];
    const refused = [];
    for (let round = 0; round < rounds; round++) {
      calm.push(median((await wave(room)).map((a) => a.ms)));
      const answers = await wave(4 * room);
      full.push(median(answers.filter((a) => a.status === 200).map((a) => a.ms)));
      refused.push(...answers.filter((a) => a.status === 429));
    }
    // One after the other while the server is full: the cost of a rejection without the rush of many requests at once.
    const running = wave(room);
    await new Promise((resolve) => setTimeout(resolve, 200));
    const singly = [];
    for (const content of questions(3 * room)) singly.push(await drink(server.url, content, agent));
    await running;
    const aloneMs = singly.filter((a) => a.status === 429).map((a) => a.ms);
    return {
      singlyRefusedMs: { count: aloneMs.length, median: median(aloneMs), p99: quantile(aloneMs, 0.99) },
      room,
      asked: 4 * room,
      refused: refused.length / rounds,
      allSayWhen: refused.every((a) => Number(a.retryAfter) > 0),
      refusedMs: {
        median: median(refused.map((a) => a.ms)),
        p99: quantile(
          refused.map((a) => a.ms),
          0.99,
        ),
      },
      admittedSeconds: { at1x: median(calm) / 1000, at4x: median(full) / 1000 },
    };
  } finally {
    server.stop();
  }
}

/** Time to the first token of a long conversation's second turn, compared with a new conversation of the same length. */
async function secondTurn() {
  const server = await serve();
  try {
    const [fresh, known] = [[], []];
    for (let round = -1; round < 3 * rounds; round++) {
      const long = (start) => `${start} ${"The train leaves the station at nine and arrives in the evening. ".repeat(130)}`;
      const turns = (start, answer) => [
        { role: "user", content: long(start) },
        { role: "assistant", content: answer },
        { role: "user", content: "And then?" },
      ];
      const [a, b] = [prompts.text(6), prompts.text(6)];
      const first = await ask(server.url, turns(a, "x").slice(0, 1), { max_tokens: 8 });
      const again = await ask(server.url, turns(a, first.text), { max_tokens: 2 });
      const unseen = await ask(server.url, turns(b, first.text), { max_tokens: 2 });
      if (round < 0) continue; // code that runs for the first time is slow for both
      known.push(again.times[0]);
      fresh.push(unseen.times[0]);
    }
    return { freshMs: median(fresh), knownMs: median(known), ratio: median(fresh.map((f, i) => f / known[i])) };
  } finally {
    server.stop();
  }
}

/** A streamed answer that is discarded as it arrives: the cheapest client there can be. */
function drink(url, content, agent) {
  return new Promise((resolve, reject) => {
    const start = performance.now();
    const options = { method: "POST", agent, headers: { "content-type": "application/json" } };
    const asked = request(`${url}/v1/chat/completions`, options, (response) => {
      const { statusCode: status, headers } = response;
      const end = () => resolve({ status, retryAfter: headers["retry-after"], ms: performance.now() - start });
      response.resume().on("end", end).on("error", reject);
    });
    asked.on("error", reject).end(JSON.stringify(bodyOf(content)));
  });
}

/** The cost of HTTP and the routes: 32 streams through them and the same 32 requests to the engine itself, in turns. */
async function overhead() {
  const users = 32;
  const server = await serve();
  const tokenizer = await AutoTokenizer.from_pretrained("default");
  const model = await AutoModelForCausalLM.from_pretrained("default", { threads: Number(flags.threads), kv_cache_tokens: 32768 });
  try {
    const logit_bias = new Map([2, 5].map((id) => [id, -100]));
    const encode = (content) => tokenizer.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
    const seconds = async (work) => {
      const start = performance.now();
      await work();
      return (performance.now() - start) / 1000;
    };
    const alone = (input_ids) => model.generate({ input_ids, max_new_tokens: newTokens, do_sample: false, eos_token_id: null, logit_bias });
    const agent = new Agent({ keepAlive: true });
    const served = (asked) => Promise.all(asked.map((content) => drink(server.url, content, agent)));
    const [engine, http] = [[], []];
    for (let round = -1; round < 3 * rounds; round++) {
      const asked = questions(users);
      const input_ids = asked.map(encode);
      const [inEngine, overHttp] = [await seconds(() => alone(input_ids)), await seconds(() => served(asked))];
      if (round < 0) continue; // warms up
      engine.push(inEngine);
      http.push(overHttp);
    }
    const speed = (list) => (users * newTokens) / median(list);
    return { users, engineTokensPerSecond: speed(engine), servedTokensPerSecond: speed(http), share: 1 - median(engine) / median(http) };
  } finally {
    await model.dispose();
    server.stop();
  }
}

/** Requests that need no model, each with a new text: the cost of HTTP itself. */
async function plain() {
  const server = await serve();
  try {
    const { requests, latency } = await autocannon({
      url: `${server.url}/tokenize`,
      requests: [
        {
          method: "POST",
          headers: { "content-type": "application/json" },
          setupRequest: (request) => ({ ...request, body: JSON.stringify({ model: "default", text: prompts.text(3) }) }),
        },
      ],
      connections: 32,
      duration: 5,
    });
    return { requestsPerSecond: requests.average, latencyMs: { median: latency.p50, p99: latency.p99 } };
  } finally {
    server.stop();
  }
}

/** How late the server's timers are while it encodes a text of half a million characters, and how long that takes. */
async function longText() {
  const server = await serve();
  try {
    const [encode, late] = [[], []];
    for (let round = -1; round < rounds; round++) {
      const text = `${prompts.text(6)} ${"The train leaves the station at nine. ".repeat(13_000)}`;
      await server.lateness();
      const start = performance.now();
      const response = await fetch(`${server.url}/tokenize`, {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ model: "default", text }),
      });
      if (response.status !== 200) throw new Error(`/tokenize: ${response.status} ${await response.text()}`);
      await response.arrayBuffer();
      if (round < 0) continue; // starts the thread
      encode.push(performance.now() - start);
      late.push((await server.lateness()).max);
    }
    return { encodeMs: median(encode), lateMs: median(late) };
  } finally {
    server.stop();
  }
}

/** Milliseconds between tokens of answers constrained by deliberately ambiguous patterns, or by ones that exclude thousands of characters. */
async function patterns() {
  const server = await serve();
  const some = Array.from({ length: 1000 }, (_, i) => String.fromCodePoint(0x4e00 + 2 * i)).join("");
  try {
    const table = [];
    for (const pattern of ["^((a|aa|aaa|.){0,50}){0,50}b$", "^((.{0,99}b){0,9}.){0,99}$", "(a*)*(a*)*(a*)*b", `^[^${some}]{40}$`]) {
      const schema = { type: "string", pattern };
      const response_format = { type: "json_schema", json_schema: { name: "x", schema } };
      const [first, gaps] = [[], []];
      for (let round = 0; round < rounds; round++) {
        const { status, times } = await ask(server.url, questions(1)[0], { max_tokens: 25, response_format });
        if (status !== 200) throw new Error(`${pattern.slice(0, 40)}: the server answered ${status}`);
        first.push(times[0]);
        gaps.push(...times.slice(1).map((t, i) => t - times[i]));
      }
      const gapMs = { median: median(gaps), max: Math.max(...gaps) };
      table.push({ pattern: pattern.length > 40 ? `${pattern.slice(0, 10)}...` : pattern, firstMs: median(first), gapMs });
    }
    return table;
  } finally {
    server.stop();
  }
}

/** Tokens per second of the engine alone, by number of users. */
async function engineOnly(model) {
  const loaded = await AutoModelForCausalLM.from_pretrained(model, { threads: Number(flags.threads), kv_cache_tokens: 16384 });
  const ids = freshPrompts({ vocabulary: loaded.config.vocabSize, seed: Number(flags.seed) });
  const table = [];
  for (const users of [1, 4, 16]) {
    const speeds = [];
    for (let round = -1; round < rounds; round++) {
      const input_ids = Array.from({ length: users }, () => ids.ids(16));
      const start = performance.now();
      await loaded.generate({ input_ids, max_new_tokens: 24, eos_token_id: null, do_sample: false });
      if (round < 0) continue; // plans programs
      speeds.push((users * 24 * 1000) / (performance.now() - start));
    }
    table.push({ users, tokensPerSecond: median(speeds) });
  }
  await loaded.dispose();
  return table;
}

if (flags.engine) results.engine = await engineOnly(flags.engine);
else {
  results.crowd = await crowd();
  results.overload = await overload();
  results.overhead = await overhead();
  results.secondTurn = await secondTurn();
  results.plain = await plain();
  results.longText = await longText();
  results.patterns = await patterns();
}
if (flags.json) console.log(JSON.stringify(results, null, 1));
else {
  const f = (x, digits = 1) => x.toFixed(digits).padStart(8);
  for (const r of results.engine ?? []) console.log(`${String(r.users).padStart(4)} users ${f(r.tokensPerSecond)} tokens/s`);
  for (const r of results.crowd ?? [])
    console.log(
      `${String(r.users).padStart(4)} streams ${f(r.tokensPerSecond, 0)} tokens/s   same answer alone: ${r.sameAsAlone.padEnd(10)}  first token ${f(r.firstMs.median)} ms (p99 ${f(r.firstMs.p99)})   between tokens ${f(r.gapMs.median, 2)} ms (p99 ${f(r.gapMs.p99, 2)})   outside steps ${f(100 * r.outsideSteps)} %   timers late: p99 ${f(r.lateMs.p99)} ms, at most ${f(r.lateMs.max)}`,
    );
  if (results.overload) {
    const { room, asked, refused, allSayWhen, refusedMs, singlyRefusedMs: one, admittedSeconds: s } = results.overload;
    console.log(
      `${asked} requests where ${room} are admitted: ${refused} get 429${allSayWhen ? " with Retry-After" : ""} within ${f(refusedMs.median)} ms (p99 ${f(refusedMs.p99)}), one at a time within ${f(one.median)} ms (p99 ${f(one.p99)}); admitted requests take ${s.at4x.toFixed(2)} s (${s.at1x.toFixed(2)} s without the others)`,
    );
    const o = results.overhead;
    console.log(
      `${o.users} streams over HTTP, client included: ${f(o.servedTokensPerSecond, 0)} tokens/s; the engine alone ${f(o.engineTokensPerSecond, 0)}: ${f(100 * o.share)} % of the time is spent outside the engine`,
    );
    const { freshMs, knownMs, ratio } = results.secondTurn;
    console.log(
      `first token of a long conversation's second turn: ${f(knownMs)} ms; of a new conversation as long: ${f(freshMs)} ms; ${ratio.toFixed(1)} x`,
    );
    const { requestsPerSecond, latencyMs } = results.plain;
    const { encodeMs, lateMs } = results.longText;
    console.log(
      `a text of half a million characters is encoded within ${f(encodeMs, 0)} ms; timers are at most ${f(lateMs)} ms late meanwhile`,
    );
    for (const { pattern, firstMs, gapMs } of results.patterns)
      console.log(
        `${pattern.padEnd(32)} first token ${f(firstMs)} ms   between tokens ${f(gapMs.median, 2)} ms (at most ${f(gapMs.max, 2)})`,
      );
    console.log(`/tokenize: ${f(requestsPerSecond, 0)} requests/s, ${latencyMs.median} ms (p99 ${latencyMs.p99})`);
  }
}
process.exit(0);
