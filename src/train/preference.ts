/**
 * Direct preference optimisation (https://arxiv.org/abs/2305.18290), with TRL's sigmoid loss: answers that were chosen become likelier than those
 * rejected, measured against a reference model. Knows no text.
 */
import type { Program } from "../backend/backend.ts";
import { Graph, type Tensor } from "../graph/graph.ts";
import { crossEntropy } from "../model/linear.ts";
import type { Forward } from "../model/model.ts";
import { symbol } from "../tensor/shape.ts";
import type { RowLimits } from "./check.ts";
import type { PreferenceExample } from "./data/example.ts";
import type { Batch, Meter, Objective } from "./loss.ts";
import type { Trainee } from "./trainee.ts";

/** A row, with what the reference model makes of it if that is known, by TRL's names. */
export interface PreferenceRow extends PreferenceExample {
  readonly ref_chosen_logps?: number;
  readonly ref_rejected_logps?: number;
}

export interface PreferenceOptions {
  /** How closely the model stays with the reference: larger is closer. TRL's default 0.1. */
  readonly beta: number;
  /** The probability that a preference is the wrong way round (https://arxiv.org/abs/2305.18290, appendix). TRL's default 0. */
  readonly label_smoothing: number;
}

const LOGPS = "logps";
/** Rows whose logits are in memory at a time in the reference model. */
const CHUNK = 128;

/** @param reference null: each row brings its own log-probabilities */
export function preference(options: PreferenceOptions, reference: Reference | null): Objective<PreferenceRow> {
  const { beta } = options;
  const known = new WeakMap<PreferenceRow, Logps>();
  const logpsOf = (row: PreferenceRow): Logps => {
    const { ref_chosen_logps: chosen, ref_rejected_logps: rejected } = row;
    const found = chosen !== undefined && rejected !== undefined ? { chosen, rejected } : known.get(row);
    if (!found) throw new Error("internal: a row without reference");
    return found;
  };
  return {
    loss: (g, forward, chunk) => loss(g, forward, options, chunk),
    count: () => 1,
    length: ({ prompt_ids, chosen_ids, rejected_ids }) => 2 * prompt_ids.length + chosen_ids.length + rejected_ids.length,
    sequences: 2,
    check: (row, index, limits) => check(row, index, limits, reference !== null),
    async prepare(rows) {
      const open = rows.filter((row) => (row.ref_chosen_logps === undefined || row.ref_rejected_logps === undefined) && !known.has(row));
      if (open.length === 0) return;
      const logps = await (reference as Reference).logps(open);
      open.forEach((row, i) => {
        known.set(row, logps[i]);
      });
    },
    collate(rows, total) {
      const { inputs, ...sizes } = laidOut(rows);
      const sequences = rows.length * 2;
      // Each pair's sum is in the place of its chosen sequence; the other places count nothing.
      const [offsets, weights] = [new Float32Array(sequences), new Float32Array(sequences)];
      rows.forEach((row, i) => {
        const { chosen, rejected } = logpsOf(row);
        offsets[2 * i] = -beta * (chosen - rejected);
        weights[2 * i] = 1 / Math.max(1, total);
      });
      const signs = Float32Array.from({ length: sequences }, (_, s) => (s % 2 === 0 ? beta : -beta));
      const pairs = Int32Array.from({ length: sequences }, (_, s) => s - (s % 2));
      return { ...sizes, inputs: { ...inputs, offsets, weights, signs, pairs } };
    },
    outputs: ({ sequences }) => ({ [LOGPS]: sequences }),
    meter: () => new Rewards(beta, logpsOf),
  };
}

/** z = beta * (chosen's log-probability - rejected's - the reference's difference): -log sigmoid(z), or that and -log sigmoid(-z) by smoothing. */
function loss(g: Graph, forward: Forward, { label_smoothing: smoothing }: PreferenceOptions, chunk: number): Tensor {
  const sequences = symbol("sequences");
  const sums = logpsGraph(g, forward, chunk);
  g.output(LOGPS, sums);
  const signed = g.reshape(g.mul(sums, g.input("signs", [sequences], "f32")), [sequences, 1]);
  const differences = g.reshape(g.scatterRows(signed, g.input("pairs", [sequences], "i32"), sequences), [sequences]);
  const z = g.add(differences, g.input("offsets", [sequences], "f32"));
  const weights = g.input("weights", [sequences], "f32");
  const right = g.dot(g.softplus(g.scale(z, -1)), weights);
  if (smoothing === 0) return right;
  return g.add(g.scale(right, 1 - smoothing), g.scale(g.dot(g.softplus(z), weights), smoothing));
}

/** The log-probability of each sequence's answer, [sequences]. */
function logpsGraph(g: Graph, { hiddenStates, head, branches }: Forward, chunk: number): Tensor {
  const [rows, sequences] = [symbol("rows"), symbol("sequences")];
  const last = hiddenStates[hiddenStates.length - 1];
  const losses = crossEntropy(g, last, head, g.input("labels", [rows], "i32"), chunk, branches);
  const sums = g.scatterRows(g.reshape(losses, [rows, 1]), g.input("sequenceOf", [rows], "i32"), sequences);
  return g.scale(g.reshape(sums, [sequences]), -1);
}

/** Both sequences of each row, one after the other, with labels for their answers. */
function laidOut(rows: readonly PreferenceExample[]): Batch {
  const sequences = rows.flatMap(({ prompt_ids, chosen_ids, rejected_ids }) =>
    [chosen_ids, rejected_ids].map((answer) => ({ ids: [...prompt_ids, ...answer], prompt: prompt_ids.length })),
  );
  const count = sequences.reduce((n, { ids }) => n + ids.length, 0);
  const inputs = {
    ids: new Int32Array(count),
    positions: new Int32Array(count),
    labels: new Int32Array(count).fill(-1),
    sequenceOf: new Int32Array(count),
    segments: new Int32Array(sequences.length * 3),
  };
  let row = 0;
  sequences.forEach(({ ids, prompt }, s) => {
    inputs.ids.set(ids, row);
    inputs.segments.set([row, ids.length, 0], s * 3);
    for (let i = 0; i < ids.length; i++) {
      inputs.positions[row + i] = i;
      inputs.sequenceOf[row + i] = s;
      if (i + 1 >= prompt && i + 1 < ids.length) inputs.labels[row + i] = ids[i + 1];
    }
    row += ids.length;
  });
  return { rows: count, sequences: sequences.length, inputs };
}

function check(row: PreferenceRow, index: number, { name, vocabSize, longest }: RowLimits, hasReference: boolean): void {
  const fail = (what: string) => new RangeError(`${name}, row ${index}: ${what}`);
  const parts = [row?.prompt_ids, row?.chosen_ids, row?.rejected_ids];
  if (!parts.every((ids) => Array.isArray(ids) || ArrayBuffer.isView(ids)))
    throw fail("expected an object with three lists of whole numbers, prompt_ids, chosen_ids and rejected_ids");
  for (const [i, part] of ["prompt_ids", "chosen_ids", "rejected_ids"].entries()) {
    if (parts[i].length === 0) throw fail(`${part} has no tokens`);
    const bad = parts[i].findIndex((id) => !Number.isInteger(id) || id < 0 || id >= vocabSize);
    if (bad >= 0) throw fail(`${part}[${bad}] is ${parts[i][bad]}, outside the vocabulary of ${vocabSize}`);
  }
  const length = parts[0].length + Math.max(parts[1].length, parts[2].length);
  if (length > longest) throw fail(`has ${length} tokens, the limit is ${longest}; shorten the row`);
  const { ref_chosen_logps: chosen, ref_rejected_logps: rejected } = row;
  if ((chosen === undefined) !== (rejected === undefined))
    throw fail("has one of ref_chosen_logps and ref_rejected_logps; give both or neither");
  if (chosen === undefined && !hasReference) throw fail("has no ref_chosen_logps and ref_rejected_logps, and there is no reference model");
  if (![chosen ?? 0, rejected ?? 0].every(Number.isFinite)) throw fail("ref_chosen_logps and ref_rejected_logps must be finite numbers");
}

interface Logps {
  readonly chosen: number;
  readonly rejected: number;
}

/** Log-probabilities by a model that is not trained. */
export class Reference {
  readonly #trainee: Trainee;
  readonly #graph: Graph;
  readonly #programs = new Map<number, Program>();

  constructor(trainee: Trainee) {
    this.#trainee = trainee;
    const g = new Graph();
    const rows = symbol("rows");
    const forward = trainee.model.forward(
      g,
      (p) => (trainee.states.has(p.name) ? g.state(p.name, p.shape, "f32") : g.weight(p.name, p.shape, trainee.dtypeOf(p.name))),
      {
        ids: g.input("ids", [rows], "i32"),
        positions: g.input("positions", [rows], "i32"),
        segments: g.input("segments", [symbol("sequences"), 3], "i32"),
        cache: null,
      },
    );
    g.output(LOGPS, logpsGraph(g, forward, CHUNK));
    this.#graph = g;
  }

  async logps(rows: readonly PreferenceExample[]): Promise<Logps[]> {
    const { rows: count, sequences, inputs } = laidOut(rows);
    const most = 2 ** Math.ceil(Math.log2(Math.max(16, count)));
    const { backend, weights, states } = this.#trainee;
    const program = this.#programs.get(most) ?? backend.prepare(this.#graph, { rows: most, sequences: most }, weights, states);
    this.#programs.set(most, program);
    const logps = new Float32Array(sequences);
    await program.run({ rows: count, sequences }, inputs, { [LOGPS]: logps });
    return rows.map((_, i) => ({ chosen: logps[2 * i], rejected: logps[2 * i + 1] }));
  }

  dispose(): void {
    for (const program of this.#programs.values()) program.dispose();
    this.#programs.clear();
  }
}

/** TRL's measures: rewards are beta * (the model's log-probability - the reference's), and all are means over the pairs. */
class Rewards implements Meter<PreferenceRow> {
  readonly #beta: number;
  readonly #logpsOf: (row: PreferenceRow) => Logps;
  readonly #sums = { chosen: 0, rejected: 0, accuracies: 0, margins: 0, chosenLogps: 0, rejectedLogps: 0 };
  #pairs = 0;

  constructor(beta: number, logpsOf: (row: PreferenceRow) => Logps) {
    this.#beta = beta;
    this.#logpsOf = logpsOf;
  }

  add(rows: readonly PreferenceRow[], { [LOGPS]: logps }: Readonly<Record<string, Float32Array>>): void {
    const sums = this.#sums;
    rows.forEach((row, i) => {
      const before = this.#logpsOf(row);
      const [chosen, rejected] = [this.#beta * (logps[2 * i] - before.chosen), this.#beta * (logps[2 * i + 1] - before.rejected)];
      sums.chosen += chosen;
      sums.rejected += rejected;
      sums.accuracies += Number(chosen > rejected);
      sums.margins += chosen - rejected;
      sums.chosenLogps += logps[2 * i];
      sums.rejectedLogps += logps[2 * i + 1];
      this.#pairs++;
    });
  }

  values(): Record<string, number> {
    const n = Math.max(1, this.#pairs);
    const { chosen, rejected, accuracies, margins, chosenLogps, rejectedLogps } = this.#sums;
    return {
      "rewards/chosen": chosen / n,
      "rewards/rejected": rejected / n,
      "rewards/accuracies": accuracies / n,
      "rewards/margins": margins / n,
      "logps/chosen": chosenLogps / n,
      "logps/rejected": rejectedLogps / n,
    };
  }
}
