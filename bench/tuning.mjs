/**
 * What tuning reaches: accuracy on held-out rows of a classification task, of several methods and seeds. A seed chooses the training rows, their
 * order and the first numbers of adapters; the held-out rows are always the same. Finished runs are lines of --out, and are not repeated.
 *
 *   npm run build && node bench/tuning.mjs --train train.csv --test test.csv --text text --label category --out intents.jsonl
 *   node bench/tuning.mjs --train reviews.csv --text review --label label --names 0=差评,1=好评 --synonyms cilin.txt --out reviews.jsonl
 *     [--methods majority,words,base,lora,full,lora+head,top+head,lora+synonyms,lora+translation,tenth,tenth+synonyms] [--seeds 1,2,3] [--rows 2000]
 *     [--held 500] [--epochs 2] [--translator MODEL] [--translation-prompt TEXT]
 *
 * majority        the most frequent class                      words           logistic regression on a bag of words (bench/words.mjs)
 * base            the model as it is, asked --question         lora            adapters of every matrix, routed experts included
 * full            every parameter
 * lora+head       a classifier's head, and adapters of every matrix   top+head     a head and the highest quarter of the layers, frozen below
 * lora+synonyms   lora, and a copy with synonyms of 10 % of the rows
 * lora+translation  lora, and 10 % of the rows once more, translated to another language and back by --translator (default: the bundled model)
 * tenth           lora on 10 % of the rows                     tenth+synonyms  the same with four copies with synonyms of each, in as many steps
 *
 * Models without a head learn to answer a text with the name of its class, and then do so under a pattern of all names, greedily.
 */
import { execFileSync } from "node:child_process";
import { appendFileSync, existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { parse } from "csv-parse/sync";
import { AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, openDataset, PeftModel, Trainer } from "../dist/index.js";
import { features, logisticRegression, vocabularyOf } from "./words.mjs";

const PROBLEM = "single_label_classification";
const METHODS = [
  "majority",
  "words",
  "base",
  "lora",
  "full",
  "lora+head",
  "top+head",
  "lora+synonyms",
  "lora+translation",
  "tenth",
  "tenth+synonyms",
];
const { values: flags } = parseArgs({
  options: {
    train: { type: "string" },
    test: { type: "string" },
    text: { type: "string", default: "text" },
    label: { type: "string", default: "label" },
    names: { type: "string" },
    question: { type: "string", default: "{text}" },
    synonyms: { type: "string" },
    translator: { type: "string", default: "default" },
    "translation-prompt": { type: "string", default: "Translate into {language}: {text}" },
    model: { type: "string", default: "default" },
    methods: { type: "string", default: METHODS.join() },
    seeds: { type: "string", default: "1,2,3" },
    rows: { type: "string", default: "2000" },
    held: { type: "string", default: "500" },
    epochs: { type: "string", default: "2" },
    batch: { type: "string", default: "16" },
    "lora-rate": { type: "string", default: "2e-3" },
    "full-rate": { type: "string", default: "5e-4" },
    threads: { type: "string", default: "2" },
    out: { type: "string" },
  },
});
if (!flags.train || !flags.out) throw new Error("--train FILE --out FILE: see the header of this file");
const [rows, held, epochs, batch, threads] = ["rows", "held", "epochs", "batch", "threads"].map((name) => Number(flags[name]));
const methods = flags.methods.split(",");
const unknown = methods.find((method) => !METHODS.includes(method));
if (unknown) throw new Error(`--methods: there is no ${unknown}; there are ${METHODS.join(", ")}`);
const seeds = flags.seeds.split(",").map(Number);

const renamed = new Map((flags.names?.split(",") ?? []).map((pair) => pair.split("=")));
const named = (label) => renamed.get(label) ?? label.replaceAll("_", " ").toLowerCase();
const read = (file) =>
  parse(readFileSync(file, "utf8"), { columns: true, bom: true, relax_quotes: true })
    .map((row) => ({ text: row[flags.text].trim(), label: named(row[flags.label]) }))
    .filter(({ text }) => text !== "" && text.length <= 400);

/** The rows in an order that depends on the seed alone. */
function shuffled(list, seed) {
  const order = [...list];
  let state = seed;
  for (let i = order.length - 1; i > 0; i--) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    const j = Math.floor((state / 2 ** 32) * (i + 1));
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}

const all = shuffled(read(flags.train), 17);
const testRows = (flags.test ? shuffled(read(flags.test), 17) : all).slice(0, held);
const heldTexts = new Set(testRows.map(({ text }) => text));
const pool = all.filter(({ text }) => !heldTexts.has(text));
const labels = [...new Set(pool.map(({ label }) => label))].sort();
const trainRows = (seed) => shuffled(pool, seed).slice(0, rows);
const accuracy = (answers) => answers.filter((answer, i) => answer === testRows[i].label).length / testRows.length;

const folder = mkdtempSync(join(tmpdir(), "mixtape-tuning-"));
process.on("exit", () => rmSync(folder, { recursive: true, force: true }));
const tokenizer = await AutoTokenizer.from_pretrained(flags.model);

function majority(train) {
  const counts = new Map();
  for (const { label } of train) counts.set(label, (counts.get(label) ?? 0) + 1);
  const [most] = [...counts].sort((a, b) => b[1] - a[1])[0];
  return testRows.map(() => most);
}

function words(train) {
  const vocabulary = vocabularyOf(train.map(({ text }) => text));
  const encode = ({ text }) => features(text, vocabulary);
  const classify = logisticRegression(
    train.map(encode),
    train.map(({ label }) => labels.indexOf(label)),
    { classes: labels.length, width: vocabulary.size },
  );
  return testRows.map((row) => labels[classify(encode(row))]);
}

/** The class that a model writes, greedily, when its answer has to be one. */
async function answers(model, question) {
  const prompts = testRows.map(({ text }) =>
    tokenizer.apply_chat_template([{ role: "user", content: question.replace("{text}", () => text) }], { add_generation_prompt: true }),
  );
  const pattern = labels.map((label) => label.replace(/[.*+?^${}()|[\]\\/]/g, "\\$&")).join("|");
  const format = { tokenizer, response_format: { type: "regex", pattern }, max_new_tokens: 32, do_sample: false };
  const found = await model.generate({ input_ids: prompts, ...format });
  return found.map((ids, i) => tokenizer.decode(ids.slice(prompts[i].length), { skip_special_tokens: true }).trim());
}

/** The rows with copies whose words are replaced by synonyms. */
function withSynonyms(train, fraction, copies, seed) {
  return withCopies(
    train,
    "synonyms",
    ["--copies", `${copies}`, ...(flags.synonyms ? ["--synonyms", flags.synonyms] : [])],
    fraction,
    seed,
  );
}

/** The rows with copies that were translated and back, and how many copies were made. */
function withTranslations(train, fraction, seed) {
  return withCopies(
    train,
    "back-translation",
    ["--model", flags.translator, "--prompt", flags["translation-prompt"], "--max-new-tokens", "128"],
    fraction,
    seed,
  );
}

function withCopies(train, method, how, fraction, seed) {
  const [from, to] = [join(folder, "plain.jsonl"), join(folder, "more.jsonl")];
  writeFileSync(from, train.map((row) => `${JSON.stringify(row)}\n`).join(""));
  const mixtape = fileURLToPath(new URL("../bin/mixtape.js", import.meta.url));
  const which = ["--method", method, "--fraction", `${fraction}`, "--seed", `${seed}`, "--fields", "text"];
  execFileSync(process.execPath, [mixtape, "augment", from, to, ...which, ...how, "--overwrite"], {
    stdio: ["ignore", "ignore", "pipe"],
  });
  const lines = readFileSync(to, "utf8").trim().split("\n");
  return lines.map((line) => JSON.parse(line));
}

/** Trains on rows, `visits` of them in all, and answers the held-out ones. */
async function tuned(part, train, seed, visits, head = false) {
  const file = join(folder, "rows.jsonl");
  const written = head ? (row) => row : ({ text, label }) => ({ instruction: text, output: label });
  writeFileSync(file, train.map((row) => `${JSON.stringify(written(row))}\n`).join(""));
  const data = await openDataset(file, { tokenizer, ...(head ? { task: "classification", labels } : {}) });
  const base = head
    ? await AutoModelForSequenceClassification.from_pretrained(flags.model, {
        threads,
        seed,
        id2label: { ...labels },
        problem_type: PROBLEM,
      })
    : await AutoModelForCausalLM.from_pretrained(flags.model, { threads });
  let model = base;
  if (part === "lora") model = await PeftModel.create(base, { r: 8, lora_alpha: 16, target_modules: "all-linear" }, { seed });
  else {
    const { layers } = base.config;
    await base.trainable(part === "top" ? { freeze_layers: `0-${layers - Math.ceil(layers / 4) - 1}` } : {});
  }
  const args = {
    output_dir: join(folder, "run"),
    max_steps: Math.ceil(visits / batch),
    per_device_train_batch_size: batch,
    learning_rate: Number(part === "lora" ? flags["lora-rate"] : flags["full-rate"]),
    warmup_ratio: 0.1,
    lr_scheduler_type: "cosine",
    save_strategy: "no",
    seed,
  };
  const trainer = new Trainer({ model, args, train_dataset: data });
  const { metrics } = await trainer.train();
  const found = await (head ? classes(model) : answers(model, "{text}"));
  trainer.dispose();
  if (model !== base) await model.dispose();
  await base.dispose();
  await data.close();
  return { found, tokens_per_second: Math.round(metrics.train_tokens_per_second), loss: metrics.train_loss };
}

/** The likeliest class by a head, of texts encoded as those that it was trained on. */
async function classes(model) {
  const file = join(folder, "held.jsonl");
  writeFileSync(file, testRows.map((row) => `${JSON.stringify(row)}\n`).join(""));
  const data = await openDataset(file, { tokenizer, task: "classification", labels });
  const input_ids = await Promise.all(testRows.map(async (_, i) => (await data.row(i)).input_ids));
  const { logits } = await model.forward({ input_ids });
  await data.close();
  return testRows.map((_, i) => {
    const row = [...logits.data.slice(i * labels.length, (i + 1) * labels.length)];
    return labels[row.indexOf(Math.max(...row))];
  });
}

async function measure(method, seed) {
  const train = trainRows(seed);
  const tenth = train.slice(0, Math.round(train.length / 10));
  const visits = train.length * epochs;
  switch (method) {
    case "majority":
      return { found: majority(train) };
    case "words":
      return { found: words(train) };
    case "base": {
      const model = await AutoModelForCausalLM.from_pretrained(flags.model, { threads });
      const found = await answers(model, flags.question);
      await model.dispose();
      return { found };
    }
    case "lora+head":
    case "top+head":
      return tuned(method.slice(0, -"+head".length), train, seed, visits, true);
    case "lora+synonyms":
      return tuned("lora", withSynonyms(train, 0.1, 1, seed), seed, visits);
    case "lora+translation": {
      const rows = withTranslations(train, 0.1, seed);
      return { ...(await tuned("lora", rows, seed, visits)), copies: rows.length - train.length };
    }
    case "tenth":
      return tuned("lora", tenth, seed, visits / 4);
    case "tenth+synonyms":
      return tuned("lora", withSynonyms(tenth, 1, 4, seed), seed, visits / 4);
    default:
      return tuned(method, train, seed, visits);
  }
}

const done = existsSync(flags.out)
  ? readFileSync(flags.out, "utf8")
      .trim()
      .split("\n")
      .filter(Boolean)
      .map((line) => JSON.parse(line))
  : [];
console.log(`${Math.min(rows, pool.length)} training rows a seed, ${testRows.length} held out, ${labels.length} classes`);
for (const seed of seeds)
  for (const method of methods) {
    if (done.some((run) => run.method === method && run.seed === seed)) continue;
    const begun = performance.now();
    const { found, ...more } = await measure(method, seed);
    const run = { method, seed, accuracy: accuracy(found), seconds: (performance.now() - begun) / 1000, ...more };
    done.push(run);
    appendFileSync(flags.out, `${JSON.stringify(run)}\n`);
    console.log(`${method}, seed ${seed}: ${(100 * run.accuracy).toFixed(1)} % in ${run.seconds.toFixed(0)} s`);
  }

console.log("\n| method | mean | seeds |\n| --- | --- | --- |");
for (const method of METHODS) {
  const runs = done.filter((run) => run.method === method).sort((a, b) => a.seed - b.seed);
  if (runs.length === 0) continue;
  const each = runs.map((run) => 100 * run.accuracy);
  console.log(`| ${method} | ${(each.reduce((a, b) => a + b) / each.length).toFixed(1)} % | ${each.map((x) => x.toFixed(1)).join(", ")} |`);
}
