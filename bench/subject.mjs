/**
 * A process that holds one model for the benchmarks and answers questions: prompts in, the arrival times of their tokens out.
 * Each subject has a process of its own, so that compared builds share no heap, compiled code or threads. It uses only public entry
 * points and GREEDY, so that it can run the build of another checkout. Does not know what is measured.
 */
import { fork } from "node:child_process";
import { fileURLToPath, pathToFileURL } from "node:url";

const SETTING = "BENCH_SUBJECT";

/**
 * Starts `script` (this one by default) with a setting, here { root, model, options }. `ready` resolves to its description of
 * the model, `ask` to its answer.
 */
export function startSubject(setting, script = import.meta.url) {
  const child = fork(fileURLToPath(script), { env: { ...process.env, [SETTING]: JSON.stringify(setting) }, serialization: "advanced" });
  const answer = () =>
    new Promise((resolve, reject) => {
      const onMessage = ({ value, error }) => {
        child.off("exit", onExit);
        if (error === undefined) resolve(value);
        else reject(new Error(`${setting.model}: ${error}`));
      };
      const onExit = (code, signal) => {
        child.off("message", onMessage);
        reject(new Error(`${setting.model}: its process ended with ${signal ?? code}`));
      };
      child.once("message", onMessage).once("exit", onExit);
    });
  return {
    ready: answer(),
    ask: (question) => {
      const answered = answer();
      child.send(question);
      return answered;
    },
    stop: () => child.kill("SIGKILL"),
  };
}

/** For the script of a subject: opens the model with `open`, which returns [description, answer], and answers what is asked. */
export async function serveSubject(open) {
  const reply = (promise) =>
    promise.then(
      (value) => process.send({ value }),
      (error) => process.send({ error: error.stack ?? String(error) }),
    );
  process.on("disconnect", () => process.kill(process.pid, "SIGKILL")); // a running step would delay a normal exit
  const opened = open(JSON.parse(process.env[SETTING]));
  await reply(opened.then(([description]) => description));
  const [, answer] = await opened;
  process.on("message", (question) => void reply(answer(question)));
}

/**
 * Asks subjects in turns and returns a list of results for each. Round 0 warms up and is left out; the order is reversed in
 * every second round, so that being first favours nobody. `measure(subject, prompts)` gets the prompts that `prepare` made for
 * the round.
 */
export async function inTurns(subjects, rounds, prepare, measure) {
  const results = subjects.map(() => []);
  for (let round = 0; round <= rounds; round++) {
    const prompts = prepare();
    const order = round % 2 ? subjects : [...subjects].reverse();
    for (const subject of order) {
      const measured = await measure(subject, prompts);
      if (round > 0) results[subjects.indexOf(subject)].push(measured);
    }
  }
  return results;
}

/** The arrival times of an answer's tokens, in milliseconds after `start`, and their ids. */
export async function arrivals(tokens, start, onToken = () => {}) {
  const [times, ids] = [[], []];
  for await (const { id } of tokens) {
    times.push(performance.now() - start);
    ids.push(id);
    onToken(ids.length);
  }
  return { times, ids };
}

/** Opens a model of the checkout in `root`. */
async function open({ root, model, options }) {
  const { AutoModelForCausalLM } = await import(pathToFileURL(`${root}/dist/index.js`));
  const { GREEDY } = await import(pathToFileURL(`${root}/dist/engine/sampling.js`));
  const { engine, config } = await AutoModelForCausalLM.from_pretrained(model, options);
  const seconds = () => [...engine.profile()].reduce((sum, [, op]) => sum + op.seconds, 0);

  /**
   * Answers all prompts at once. With `late`, one more prompt that is submitted as soon as each of the others has eight tokens;
   * its answer is the last.
   */
  async function answer({ prompts, newTokens, sampling = {}, late }) {
    const before = { native: seconds(), steps: engine.stats().steps };
    const start = performance.now();
    const submit = (tokens, maxNewTokens) => engine.submit({ tokens, sampling: { ...GREEDY, ...sampling }, maxNewTokens });
    let behind = prompts.length;
    let submitLate;
    const lateAnswer = late
      ? new Promise((resolve) => {
          submitLate = () => resolve(arrivals(submit(late, 1), performance.now()));
        })
      : null;
    const onToken = (count) => count === 8 && --behind === 0 && submitLate?.();
    const answers = await Promise.all(prompts.map((tokens) => arrivals(submit(tokens, newTokens), start, onToken)));
    if (lateAnswer) answers.push(await lateAnswer);
    const wall = (performance.now() - start) / 1000;
    return { answers, wall, native: seconds() - before.native, steps: engine.stats().steps - before.steps };
  }
  return [{ vocabulary: config.vocabSize, positions: config.maxPositions }, answer];
}

if (process.env[SETTING] !== undefined && process.argv[1] === fileURLToPath(import.meta.url)) await serveSubject(open);
