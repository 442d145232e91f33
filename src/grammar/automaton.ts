/**
 * Follows a grammar byte by byte and computes which tokens may come next. States are built lazily and cached: a state is a set of
 * frames, and a frame is an expected expression plus its continuation, so recursion costs nothing up front. For very ambiguous
 * grammars the work per token is limited by allowing less than the grammar does, never more. Knows no tokenizer.
 */
import { type Expression, MANY } from "./expression.ts";
import { deadParts } from "./productive.ts";
import type { Trie } from "./trie.ts";
import { run, type Steps } from "./work.ts";

/** Most frames of one state, and most frames stepped for one mask. */
const MAX_FRAMES = 1024;
const MAX_WORK = 200_000;
/** Most cached frames, counting frames in states; beyond it the cache is cleared. */
const MAX_KEPT = 100_000;
/** Nodes of the vocabulary and frames that are looked at between two pauses. */
const SLICE = 4000;

/** What is expected (null: the end), with counters of its kind, and what comes after it. Equal frames are one object. */
class Frame {
  readonly id: number;
  readonly expression: Expression | null;
  /** Position in bytes or a sequence, characters of a tag seen, or least and most repetitions left. */
  readonly a: number;
  readonly b: number;
  readonly next: Frame | null;
  /** The same with counters clamped; null: not known yet. */
  clamped: Frame | null = null;

  constructor(id: number, expression: Expression | null, a: number, b: number, next: Frame | null) {
    this.id = id;
    this.expression = expression;
    this.a = a;
    this.b = b;
    this.next = next;
  }
}

export class State {
  readonly frames: readonly Frame[];
  /** The answer may end here. */
  readonly accepting: boolean;
  /** The `text` frame that all frames derive from, if there is one. */
  readonly text: Frame | null;
  /** Next state by byte; null: the byte is not allowed. */
  readonly next: (State | null | undefined)[] = [];
  mask: Int32Array | null = null;
  /** Cache generation: states of one epoch may refer to each other. */
  readonly epoch: number;

  constructor(frames: readonly Frame[], text: Frame | null, epoch: number) {
    this.epoch = epoch;
    this.frames = frames;
    this.accepting = frames.some((frame) => frame.expression === null);
    this.text = text;
  }
}

/** What can follow in a JSON string, whatever its length and whatever follows it. */
interface Inside {
  /** By token: the characters that it adds, one that it only begins included; `LEAVES` if it does not stay inside the string. */
  readonly characters: Uint16Array;
  /** The trie nodes right after the closing quote, and the characters before it. */
  readonly exits: readonly (readonly [node: number, characters: number])[];
  /** Masks of the tokens that stay inside, by the number of characters left. */
  readonly masks: Map<number, Int32Array>;
}
const LEAVES = 0xffff;

/** Insides by their kind of character, shared by all grammars of one vocabulary. */
export type Insides = Map<Expression, Inside>;

export class Automaton {
  readonly #grammar: Expression;
  /** Parts of the grammar that lead nowhere. */
  readonly #dead: ReadonlySet<Expression>;
  readonly #trie: Trie;
  readonly #endIds: readonly number[];
  readonly #insides: Insides;
  #states = new Map<string, State>();
  /** Frames by their continuation. */
  #before = new Map<Frame, Map<Expression, Map<number, Frame>>>();
  #start: State | null = null;
  #epoch = 0;
  #kept = 0;
  #frames = 0;
  /** Frames stepped so far. */
  #work = 0;

  /**
   * @param endIds tokens that end an answer: allowed where the grammar may end, and only there
   * @param dead parts of the grammar that lead nowhere
   */
  constructor(
    grammar: Expression,
    trie: Trie,
    endIds: readonly number[],
    insides: Insides,
    dead: ReadonlySet<Expression> = run(deadParts(grammar)),
  ) {
    this.#grammar = grammar;
    this.#dead = dead;
    this.#trie = trie;
    this.#endIds = endIds;
    this.#insides = insides;
  }

  get start(): State {
    if (this.#kept > MAX_KEPT) this.#forget();
    this.#start ??= this.#state([this.#enter(this.#grammar, this.#end())]) ?? new State([], null, this.#epoch);
    return this.#start;
  }

  /** Size of the cache, in units of a few hundred bytes. */
  get kept(): number {
    return this.#kept;
  }

  /** The state after a token; null if it is not allowed. The caller handles end tokens. */
  accept(state: State, id: number): State | null {
    const bytes = this.#trie.bytes[id];
    let at: State | null = bytes.length === 0 ? this.#special(state, id) : state;
    for (const byte of bytes) {
      if (at === null) return null;
      at = this.#step(at, byte);
    }
    if (this.#kept > MAX_KEPT) this.#forget();
    // A state from before the cache was cleared would keep everything reachable from it alive.
    return at === null || at.epoch === this.#epoch ? at : this.#known(at.frames, at.text);
  }

  #forget(): void {
    this.#states = new Map();
    this.#before = new Map();
    this.#start = null;
    this.#kept = 0;
    this.#epoch++;
  }

  /** Tokens that may come next, as bits by id. If there are none, only end tokens are set. Do not modify. */
  mask(state: State): Int32Array {
    return state.mask ?? run(this.maskSteps(state));
  }

  /** The same, with pauses: the first mask of a state looks at much of the vocabulary. */
  *maskSteps(state: State): Steps<Int32Array> {
    if (state.mask) return state.mask;
    const counted = this.#clamped(state);
    const mask = counted === state ? yield* this.#allowed(state) : yield* this.maskSteps(counted);
    state.mask = mask;
    return mask;
  }

  *#allowed(state: State): Steps<Int32Array> {
    const mask = new Int32Array(this.#trie.words);
    this.#kept += 1 + (this.#trie.words >> 6);
    const found = (_: State, node: number): void => {
      for (let id = this.#trie.token[node]; id >= 0; id = this.#trie.same[id]) set(mask, id);
    };
    if (state.text) {
      const { expression, a, b, next } = state.text;
      if (expression?.kind !== "text") throw new Error(`internal: ${expression?.kind} is not a text`);
      const inside = yield* this.#inside(expression.character);
      mask.set(this.#staying(inside, b));
      const after = next && this.#state([next]);
      const exits = inside.exits.filter(([, characters]) => characters >= a && characters <= b);
      if (after) {
        for (const [node] of exits) found(after, node);
        yield* this.#search(
          after,
          exits.map(([node]) => node),
          found,
        );
      }
    } else yield* this.#search(state, [0], found);
    for (const { expression } of state.frames) {
      if (expression?.kind === "token") set(mask, expression.id);
      if (expression?.kind === "until") for (const id of this.#trie.special) if (!this.#endIds.includes(id)) set(mask, id);
    }
    if (state.accepting || mask.every((word) => word === 0)) for (const id of this.#endIds) set(mask, id);
    return mask;
  }

  /**
   * Visits every node below some nodes of the trie that a state allows, with the state there. Breadth first, so that at the limit
   * of its work the short tokens have been found.
   */
  *#search(start: State, nodes: readonly number[], visit: (state: State, node: number, from: number) => void): Steps<void> {
    const { child, sibling, byte } = this.#trie;
    const states: State[] = nodes.map(() => start);
    const open = [...nodes];
    const limit = this.#work + MAX_WORK;
    let since = 0;
    for (let i = 0; i < open.length && this.#work < limit; i++) {
      const before = this.#work;
      for (let at = child[open[i]]; at !== 0; at = sibling[at]) {
        const next = this.#step(states[i], byte[at]);
        since++;
        if (next === null) continue;
        visit(next, at, open[i]);
        if (child[at] === 0) continue;
        states.push(next);
        open.push(at);
      }
      since += this.#work - before;
      if (since < SLICE) continue;
      since = 0;
      yield;
    }
  }

  /** What may follow in a string of these characters. No character's encoding begins another's. */
  *#inside(character: Expression): Steps<Inside> {
    const known = this.#insides.get(character);
    if (known) return known;
    const inside = { characters: new Uint16Array(this.#trie.bytes.length).fill(LEAVES), exits: [] as [number, number][], masks: new Map() };
    const start = this.#state([this.#frame({ kind: "text", character, min: 0, max: MANY }, 0, MANY, this.#end())]);
    if (start === null) throw new Error("internal: a string may always end");
    /** Whole characters up to each node. */
    const whole = new Uint16Array(this.#trie.child.length);
    yield* this.#search(start, [0], (state, node, from) => {
      if (state.accepting) {
        inside.exits.push([node, whole[from]]);
        return;
      }
      whole[node] = whole[from] + (state === start ? 1 : 0);
      const characters = whole[from] + 1;
      for (let id = this.#trie.token[node]; id >= 0; id = this.#trie.same[id]) inside.characters[id] = characters;
    });
    this.#insides.set(character, inside);
    return inside;
  }

  /** Tokens that stay inside a string of which at most `left` characters remain. */
  #staying({ characters, masks }: Inside, left: number): Int32Array {
    const known = masks.get(left);
    if (known) return known;
    const mask = new Int32Array(this.#trie.words);
    for (let id = 0; id < characters.length; id++) if (characters[id] !== LEAVES && characters[id] <= left) set(mask, id);
    masks.set(left, mask);
    return mask;
  }

  #step(state: State, byte: number): State | null {
    const known = state.next[byte];
    if (known !== undefined) return known;
    const targets: Frame[] = [];
    for (const frame of state.frames) {
      const { expression: e, a, next } = frame;
      if (e === null || next === null) continue;
      if (e.kind === "bytes") {
        if (e.bytes[a] === byte) targets.push(a + 1 === e.bytes.length ? next : this.#frame(e, a + 1, 0, next));
      } else if (e.kind === "byte") {
        if (e.ranges.some(([from, to]) => byte >= from && byte <= to)) targets.push(next);
      } else if (e.kind === "until") {
        const seen = markSeen(e.mark, a, byte);
        targets.push(seen === e.mark.length ? next : this.#frame(e, seen, 0, next));
      }
    }
    const found = this.#state(targets);
    state.next[byte] = found;
    return found;
  }

  #special(state: State, id: number): State | null {
    return this.#state(
      state.frames.flatMap(({ expression: e, next }) => {
        if (next === null) return [];
        if (e?.kind === "token") return e.id === id ? [next] : [];
        if (e?.kind === "until") return [e.token === id ? next : this.#frame(e, 0, 0, next)];
        return [];
      }),
    );
  }

  /** The state of everything that the frames expect next; null if that is nothing. */
  #state(targets: readonly Frame[]): State | null {
    const found = new Map<number, Frame>();
    const seen = new Set<Frame>();
    for (const frame of targets) this.#expand(frame, found, seen);
    this.#work += targets.length + found.size;
    if (found.size === 0) return null;
    const frames = [...found.values()].sort((x, y) => x.id - y.id);
    const [first] = targets;
    const text = targets.every((t) => t === first) ? this.#textOf(first) : null;
    return this.#known(frames, text);
  }

  /** The `text` that a frame begins with, if it can begin with nothing else. */
  #textOf(frame: Frame): Frame | null {
    const { expression: e, a, next } = frame;
    if (e === null || next === null) return null;
    if (e.kind === "text") return frame;
    if (e.kind !== "sequence" || a >= e.items.length) return null;
    return this.#textOf(this.#enter(e.items[a], a + 1 < e.items.length ? this.#frame(e, a + 1, 0, next) : next));
  }

  #known(frames: readonly Frame[], text: Frame | null): State {
    const key = `${text ? text.id : ""}:${frames.map((frame) => frame.id).join()}`;
    let state = this.#states.get(key);
    if (!state) {
      state = new State(frames, text, this.#epoch);
      this.#states.set(key, state);
      this.#kept += 1 + frames.length;
    }
    return state;
  }

  /** Expands a frame down to expressions that take a byte or a token, or the end. Not recursive: choices may be deep. */
  #expand(start: Frame, found: Map<number, Frame>, seen: Set<Frame>): void {
    const pending = [start];
    for (let frame = pending.pop(); frame !== undefined && found.size < MAX_FRAMES; frame = pending.pop()) {
      if (seen.has(frame)) continue;
      seen.add(frame);
      const { expression: e, a, b, next } = frame;
      if (e === null || next === null) {
        found.set(frame.id, frame);
        continue;
      }
      switch (e.kind) {
        case "bytes":
          if (e.bytes.length > 0) found.set(frame.id, frame);
          else pending.push(next);
          break;
        case "byte":
        case "token":
          found.set(frame.id, frame);
          break;
        case "until": {
          found.set(frame.id, frame);
          let end: Frame = frame;
          while (end.next) end = end.next;
          if (e.mayEnd) found.set(end.id, end);
          break;
        }
        case "sequence":
          if (e.items.length === 0) pending.push(next);
          else pending.push(this.#enter(e.items[a], a + 1 < e.items.length ? this.#frame(e, a + 1, 0, next) : next));
          break;
        case "choice":
          for (let i = e.items.length - 1; i >= 0; i--) if (!this.#dead.has(e.items[i])) pending.push(this.#enter(e.items[i], next));
          break;
        case "repeat":
        case "text": {
          const end = e.kind === "repeat" ? next : this.#frame(QUOTE, 0, 0, next);
          const item = e.kind === "repeat" ? e.item : e.character;
          if (b > 0 && !this.#dead.has(item)) {
            const last = e.kind === "repeat" && b === 1 && a <= 1;
            pending.push(this.#enter(item, last ? next : this.#frame(e, Math.max(a - 1, 0), b === MANY ? b : b - 1, next)));
          }
          if (a === 0) pending.push(end);
          break;
        }
        case "rule":
          if (e.to) pending.push(this.#enter(e.to, next));
          break;
        default:
          e satisfies never;
      }
    }
  }

  #enter(e: Expression, next: Frame): Frame {
    return e.kind === "repeat" || e.kind === "text" ? this.#frame(e, e.min, e.max, next) : this.#frame(e, 0, 0, next);
  }

  #frame(e: Expression, a: number, b: number, next: Frame): Frame {
    const key = a * 2 * MANY + b;
    let all = this.#before.get(next);
    if (!all) this.#before.set(next, (all = new Map()));
    let same = all.get(e);
    if (!same) all.set(e, (same = new Map()));
    let frame = same.get(key);
    if (!frame) {
      same.set(key, (frame = new Frame(this.#frames++, e, a, b, next)));
      this.#kept++;
    }
    return frame;
  }

  #end(): Frame {
    return new Frame(this.#frames++, null, 0, 0, null);
  }

  /**
   * The state with counters clamped to what any token can distinguish: a string of at most 2,000 characters allows the same next
   * tokens after 10 characters as after 20, and as one without a limit, so their mask is computed once, and without counting.
   */
  #clamped(state: State): State {
    if (state.text) {
      const text = this.#clamp(state.text);
      return text === state.text ? state : (this.#state([text]) ?? state);
    }
    const frames = state.frames.map((frame) => this.#clamp(frame));
    return frames.every((frame, i) => frame === state.frames[i]) ? state : (this.#state(frames) ?? state);
  }

  /** Not recursive: a frame continues with as many others as the answer has open brackets. */
  #clamp(frame: Frame): Frame {
    const most = this.#trie.depth + 1;
    const open: Frame[] = [];
    let at: Frame | null = frame;
    for (; at !== null && at.clamped === null; at = at.next) open.push(at);
    let below = at?.clamped ?? null;
    for (let each = open.pop(); each !== undefined; each = open.pop()) {
      const { expression: e, next } = each;
      if (e === null || next === null || below === null) below = each.clamped = each;
      else {
        const counts = e.kind === "repeat" || e.kind === "text";
        const a = counts ? Math.min(each.a, most) : each.a;
        const b = counts && each.b >= most ? MANY : each.b;
        const same = below === next && a === each.a && b === each.b;
        below = each.clamped = same ? each : this.#frame(e, a, b, below);
      }
    }
    return below ?? frame;
  }
}

const QUOTE: Expression = { kind: "bytes", bytes: Uint8Array.of(0x22) };

function set(mask: Int32Array, id: number): void {
  mask[id >> 5] |= 1 << (id & 31);
}

/** How many bytes of the tag have been seen after one more byte. */
function markSeen(mark: Uint8Array, seen: number, byte: number): number {
  for (let length = seen + 1; length > 0; length--) {
    // The last `length` bytes are mark[seen - length + 1 .. seen - 1] and the new one.
    if (mark[length - 1] !== byte) continue;
    let same = true;
    for (let i = 0; i < length - 1 && same; i++) same = mark[i] === mark[seen - length + 1 + i];
    if (same) return length;
  }
  return 0;
}
