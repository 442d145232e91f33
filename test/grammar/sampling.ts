/** Texts that a grammar allows, drawn byte by byte: no tokenizer and no model. Rare branches are as likely as common ones. */
import { Automaton } from "../../src/grammar/automaton.ts";
import type { Expression } from "../../src/grammar/expression.ts";
import { Trie } from "../../src/grammar/trie.ts";

const END = 256;
/** One token a byte. */
const trie = await Trie.build({ specialIds: [], has: (id) => id < END, isSpecial: () => false, bytes: (id) => Uint8Array.of(id) }, END + 1);

/** Numbers that repeat with their seed (https://en.wikipedia.org/wiki/Linear_congruential_generator). */
export function seeded(seed: number): () => number {
  let state = seed >>> 0;
  return () => (state = (Math.imul(state, 1664525) + 1013904223) >>> 0) / 2 ** 32;
}

export class Sampler {
  readonly #automaton: Automaton;

  constructor(grammar: Expression) {
    this.#automaton = new Automaton(grammar, trie, [END], new Map());
  }

  /**
   * A text chosen by `random` (from 0 to 1); after `patience` bytes it ends as soon as it can. Null if that takes too long.
   * Throws where the grammar leads nowhere.
   */
  draw(random: () => number, patience: number): string | null {
    const bytes: number[] = [];
    let state = this.#automaton.start;
    for (let step = 0; step < 4000; step++) {
      const allowed = this.#allowed(state);
      const mayEnd = state.accepting;
      if (allowed.length === 0 && !mayEnd) throw new Error(`leads nowhere: ${Buffer.from(bytes).toString()}`);
      if (mayEnd && (allowed.length === 0 || step >= patience || random() < 0.3)) return Buffer.from(bytes).toString();
      const pool = pick(allowed, step >= patience, random);
      const byte = pool[Math.min(pool.length - 1, Math.floor(random() * pool.length))];
      bytes.push(byte);
      const next = this.#automaton.accept(state, byte);
      if (next === null) throw new Error("the mask allowed a byte that the grammar refuses");
      state = next;
    }
    return null;
  }

  /** Whether the grammar accepts a text as a whole. */
  accepts(text: string): boolean {
    let state = this.#automaton.start;
    for (const byte of Buffer.from(text)) {
      const next = this.#automaton.accept(state, byte);
      if (next === null) return false;
      state = next;
    }
    return state.accepting;
  }

  #allowed(state: Parameters<Automaton["mask"]>[0]): number[] {
    const mask = this.#automaton.mask(state);
    const ids: number[] = [];
    for (let id = 0; id < END; id++) if ((mask[id >> 5] >>> (id & 31)) & 1) ids.push(id);
    return ids;
  }
}

const KINDS = [/[\]}"]/, /[0-9]/, /[a-z]/, /[A-Z]/, /[,:]/, /\\/, /[-+.]/, /\s/, /[\x80-\xff]/];

/** One kind of the bytes; closing ones once it should end. */
function pick(allowed: readonly number[], closing: boolean, random: () => number): readonly number[] {
  const of = (kind: RegExp) => allowed.filter((byte) => kind.test(String.fromCharCode(byte)));
  if (closing) {
    const closers = of(/[\]}"]/);
    if (closers.length > 0) return closers;
    const plain = allowed.filter((byte) => byte < 0x80 && !/[\s,\\[{]/.test(String.fromCharCode(byte)));
    return plain.length > 0 ? plain : allowed;
  }
  const kinds = KINDS.map(of).filter((all) => all.length > 0);
  return random() < 0.5 || kinds.length === 0 ? allowed : kinds[Math.floor(random() * kinds.length)];
}
