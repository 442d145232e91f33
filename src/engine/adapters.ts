/**
 * The low-rank adapters that an engine has loaded: their matrices, stacked in states of the backend so that each row of a step can have
 * another adapter (https://arxiv.org/abs/2311.03285), and their names. Knows no files, no requests and no schedule.
 */
import { setImmediate as turn } from "node:timers/promises";
import type { Backend, State } from "../backend/backend.ts";
import type { Model, ModelParameter } from "../model/model.ts";
import { elements } from "../tensor/shape.ts";

/** The adapter of one matrix, or of all experts' matrices: scale * B(A(x)). */
export interface Branch {
  readonly rank: number;
  readonly scale: number;
  /** 1 for a single matrix. */
  readonly experts: number;
  /** [rank, in], or [experts, rank, in]; of an embedding [vocab, rank]. */
  readonly a: Float32Array;
  /** [out, rank], or [experts, out, rank]. */
  readonly b: Float32Array;
  /** Whether it is an embedding's: `a` has a row for each token. Default false. */
  readonly table?: boolean;
}

/** An adapter's branches by module: `model.layers.3.self_attn.q_proj`, `model.layers.3.mlp.experts.gate_proj`. */
export type Branches = ReadonlyMap<string, Branch>;

export interface AdapterLimits {
  /** The most adapters at once. Default 32. */
  readonly count?: number;
  /** The largest rank. Default 256. */
  readonly rank?: number;
}

/** A loaded adapter. Requests keep the one that they began with, even when its name is given to another or deleted. */
export interface LoadedAdapter {
  readonly name: string;
  /** The largest rank among its branches. */
  readonly rank: number;
  /** Rank and scale by module. */
  readonly modules: ReadonlyMap<string, Pick<Branch, "rank" | "scale">>;
  /** Its place in the stack. */
  readonly slot: number;
  /** Where its chains of remembered blocks begin: keys and values of one adapter are never another's, nor the base's. */
  readonly root: number;
}

/** What the stack has room for, and its memory. */
interface Room {
  readonly count: number;
  /** A whole number of vectors on every instruction set, so that padding changes no sum by a bit. */
  readonly rank: number;
  readonly modules: ReadonlySet<string>;
  /** The model with the stack's parameters. */
  readonly model: Model;
  /** By parameter. */
  readonly states: ReadonlyMap<string, State>;
}

const RANK_STEP = 16;

export class LoadedAdapters {
  readonly #model: Model;
  readonly #backend: Backend;
  readonly limits: Required<AdapterLimits>;
  readonly #named = new Map<string, LoadedAdapter>();
  /** Every place of the stack that has been written: by an adapter with a name, or by one that requests may still use. */
  readonly #slots: LoadedAdapter[] = [];
  #room: Room | null = null;
  #loads = 0;

  constructor(model: Model, backend: Backend, { count = 32, rank = 256 }: AdapterLimits = {}) {
    for (const [name, value] of Object.entries({ max_loras: count, max_lora_rank: rank }))
      if (!Number.isInteger(value) || value < 1 || value > 4096)
        throw new RangeError(`${name} is ${value}; it must be a whole number from 1 to 4096`);
    this.#model = model;
    this.#backend = backend;
    this.limits = { count, rank };
  }

  get names(): readonly string[] {
    return [...this.#named.keys()];
  }

  /** Bytes of memory behind all of them. */
  get bytes(): number {
    return [...(this.#room?.states.values() ?? [])].reduce((sum, state) => sum + state.bytes, 0);
  }

  /** The model with the stack's parameters, and their memory; null before the first adapter. Another one after it has grown. */
  get room(): Pick<Room, "model" | "states"> | null {
    return this.#room;
  }

  /** The adapter of this name. Throws a RangeError that lists what there is. */
  find(name: string): LoadedAdapter {
    const found = this.#named.get(name);
    if (found) return found;
    const known = this.names.length > 0 ? `there are ${this.names.join(", ")}` : "none is loaded";
    throw new RangeError(`adapter: there is no adapter '${name}'; ${known}`);
  }

  /**
   * Throws a RangeError that names the module or the number for branches that do not fit the model, are not finite, or exceed a limit.
   * Takes milliseconds per million numbers.
   */
  check(name: string, branches: Branches): void {
    const fail = (what: string) => new RangeError(`adapter '${name}': ${what}`);
    if (branches.size === 0) throw fail("it adapts no module");
    this.#checkCount(name);
    const expected = new Map(
      stackedParameters(this.#model.stacked({ count: 1, rank: 1, modules: new Set(branches.keys()) })).map((p) => [
        `${partOf(p).module} ${halfOf(p)}`,
        p,
      ]),
    );
    for (const [module, branch] of branches) {
      if (!Number.isInteger(branch.rank) || branch.rank < 1) throw fail(`${module} has rank ${branch.rank}`);
      if (branch.rank > this.limits.rank)
        throw fail(`${module} has rank ${branch.rank}, and max_lora_rank is ${this.limits.rank}; raise it if memory allows`);
      if (!Number.isFinite(branch.scale)) throw fail(`${module} has the scale ${branch.scale}`);
      for (const half of ["A", "B"] as const) {
        const parameter = expected.get(`${module} ${half === "A" ? "a" : "b"}`);
        if (!parameter) throw fail(`the model has no module ${module} that can be adapted: the adapter is of another base`);
        const numbers = half === "A" ? branch.a : branch.b;
        const wanted = elements(parameter.shape) * branch.rank;
        if (numbers.length !== wanted)
          throw fail(
            `${module}.lora_${half} has ${numbers.length} numbers, and this model needs ${wanted}: the adapter is of another base`,
          );
        const wrong = allFinite(numbers) ? -1 : numbers.findIndex((x) => !Number.isFinite(x));
        if (wrong >= 0)
          throw fail(`${module}.lora_${half} holds ${numbers[wrong]}, element ${wrong}: the file is damaged, or training had diverged`);
        if (half === "B" && !Number.isFinite(Math.fround(largest(numbers) * branch.scale)))
          throw fail(`${module}.lora_B times its scale, ${branch.scale}, exceeds what float32 holds`);
      }
    }
  }

  /**
   * Adds an adapter that `check` has accepted, under a new name or in place of another. No step and no other `add` may run meanwhile.
   * @param used whether a request still needs an adapter that has no name any more
   * @returns whether the stack was made anew, so that programs must be prepared again
   * @throws RangeError when memory does not suffice; nothing has changed then
   */
  async add(name: string, branches: Branches, used: (adapter: LoadedAdapter) => boolean): Promise<boolean> {
    this.#checkCount(name); // others may have come since `check`
    const free = this.#slots.findIndex((a) => a && this.#named.get(a.name) !== a && !used(a));
    const slot = free >= 0 ? free : this.#slots.length;
    const rank = Math.max(...[...branches.values()].map((b) => b.rank));
    const grown = await this.#grow(slot + 1, rank, branches);
    const room = this.#room as Room;
    for (const p of stackedParameters(room.model)) {
      const branch = branches.get(moduleOf(p));
      if (!branch && free < 0) continue; // the memory is still zero
      const [state, size] = [room.states.get(p.name) as State, elements(p.shape) / room.count];
      state.write(branch ? padded(p, branch, room) : new Float32Array(size), slot * size);
      await turn(); // a large adapter takes a while to copy, and only steps have to wait
    }
    const adapter: LoadedAdapter = {
      name,
      rank,
      modules: new Map([...branches].map(([module, { rank, scale }]) => [module, { rank, scale }])),
      slot,
      root: Number.MAX_SAFE_INTEGER - this.#loads++,
    };
    this.#slots[slot] = adapter;
    this.#named.set(name, adapter);
    return grown;
  }

  /** Takes away a name; its memory is used again once no request needs it. Throws a RangeError if there is no such adapter. */
  remove(name: string): void {
    this.find(name);
    this.#named.delete(name);
  }

  /** A loaded adapter's branches, read back. */
  branches(name: string): Map<string, Branch> {
    const { slot, modules } = this.find(name);
    const room = this.#room as Room;
    const found = new Map<string, { -readonly [K in keyof Branch]: Branch[K] }>();
    for (const p of stackedParameters(room.model)) {
      const module = moduleOf(p);
      const own = modules.get(module);
      if (!own) continue;
      const table = halfOf(p) === "a" && partOf(p).rankLast;
      const branch = found.get(module) ?? {
        ...own,
        ...(table ? { table, experts: 1 } : { experts: Number(p.shape[0]) / room.count }),
        a: new Float32Array(),
        b: new Float32Array(),
      };
      const size = elements(p.shape) / room.count;
      const values = resized(p, (room.states.get(p.name) as State).read(slot * size, size), room.rank, own.rank);
      branch[halfOf(p)] = halfOf(p) === "b" && own.scale !== 0 ? values.map((x) => x / own.scale) : values;
      found.set(module, branch);
    }
    return found;
  }

  dispose(): void {
    for (const state of this.#room?.states.values() ?? []) state.dispose();
    this.#room = null;
    this.#named.clear();
    this.#slots.length = 0;
  }

  #checkCount(name: string): void {
    if (this.#named.has(name) || this.#named.size < this.limits.count) return;
    throw new RangeError(
      `adapter '${name}': ${this.#named.size} adapters are loaded, and max_loras is ${this.limits.count}; delete one first, or raise it`,
    );
  }

  /** Makes room for so many adapters, this rank and these modules. Returns whether the stack had to be made anew. */
  async #grow(count: number, rank: number, branches: Branches): Promise<boolean> {
    const old = this.#room;
    const modules = new Set([...(old?.modules ?? []), ...branches.keys()]);
    if (old && old.count >= count && old.rank >= rank && old.modules.size === modules.size) return false;
    const stack = {
      count: Math.max(old?.count ?? 1, 2 ** Math.ceil(Math.log2(count))),
      rank: Math.max(old?.rank ?? 0, Math.ceil(rank / RANK_STEP) * RANK_STEP),
      modules,
    };
    const model = this.#model.stacked(stack);
    const bytes = stackedParameters(model).reduce((sum, p) => sum + elements(p.shape) * 4, 0);
    const { free } = this.#backend.memory();
    if (bytes - this.bytes > free)
      throw new RangeError(
        `adapter: ${stack.count} adapters of rank ${stack.rank} on ${modules.size} matrices take ${gib(bytes)} GiB, ${gib(bytes - this.bytes)} more than now, and ${gib(free)} GiB of memory are free`,
      );
    const states = new Map<string, State>();
    try {
      for (const p of stackedParameters(model)) states.set(p.name, this.#backend.state("f32", p.shape));
    } catch (error) {
      for (const state of states.values()) state.dispose();
      throw error;
    }
    const room: Room = { ...stack, model, states };
    if (old) await this.#move(old, room);
    this.#room = room;
    return true;
  }

  /** Copies all adapters to a larger stack, matrix by matrix, and frees the old one. */
  async #move(old: Room, room: Room): Promise<void> {
    const before = new Map(stackedParameters(old.model).map((p) => [p.name, p]));
    for (const p of stackedParameters(room.model)) {
      const [from, was] = [old.states.get(p.name), before.get(p.name)];
      if (!from || !was) continue;
      const [oldSize, size] = [elements(was.shape) / old.count, elements(p.shape) / room.count];
      const state = room.states.get(p.name) as State;
      for (const { slot } of this.#slots) state.write(resized(p, from.read(slot * oldSize, oldSize), old.rank, room.rank), slot * size);
      from.dispose();
      await turn();
    }
  }
}

const stackedParameters = ({ parameters }: Model): ModelParameter[] => parameters.filter((p) => p.kind === "adapter");
function partOf({ name, branch }: ModelParameter): NonNullable<ModelParameter["branch"]> {
  if (!branch) throw new Error(`internal: ${name} belongs to no branch`);
  return branch;
}
const moduleOf = (p: ModelParameter): string => partOf(p).module;
const halfOf = (p: ModelParameter): "a" | "b" => (partOf(p).part === "a" ? "a" : "b");

/** One adapter's half as the stack holds it: the scale in B, zeros up to the stack's rank. */
function padded(p: ModelParameter, branch: Branch, { rank }: Room): Float32Array {
  const half = halfOf(p);
  const all = resized(p, branch[half], branch.rank, rank);
  return half === "b" && branch.scale !== 1 ? all.map((x) => x * branch.scale) : all;
}

/** A copy of one adapter's half with another rank: cut off, or padded with zeros. */
function resized(p: ModelParameter, values: Float32Array, from: number, to: number): Float32Array {
  // A [experts, rank, in] has the rank's numbers of an expert in one run; B [experts, out, rank] and a table [vocab, rank] those of a row.
  const width = partOf(p).rankLast ? 1 : Number(p.shape[2]);
  const [run, long] = [from * width, to * width];
  const runs = values.length / run;
  const out = new Float32Array(runs * long);
  const kept = Math.min(run, long);
  for (let i = 0; i < runs; i++) for (let j = 0; j < kept; j++) out[i * long + j] = values[i * run + j];
  return out;
}

function largest(values: Float32Array): number {
  let most = 0;
  for (let i = 0; i < values.length; i++) most = Math.max(most, Math.abs(values[i]));
  return most;
}

function allFinite(values: Float32Array): boolean {
  let zero = 0;
  for (let i = 0; i < values.length; i++) zero += values[i] * 0; // NaN as soon as one number is not finite
  return zero === 0;
}

function gib(bytes: number): string {
  return (bytes / 2 ** 30).toFixed(2);
}
