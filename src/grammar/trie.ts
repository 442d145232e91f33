/**
 * The vocabulary as a trie of bytes, for finding the tokens that can continue a text; shared prefixes are visited once. Built in
 * pieces, so that a large vocabulary does not block the event loop. Knows no grammar.
 */
import { setImmediate } from "node:timers/promises";

const TOKENS_A_PIECE = 2000;

/** The part of a vocabulary that a trie needs. */
export interface Tokens {
  readonly specialIds: readonly number[];
  has(id: number): boolean;
  isSpecial(id: number): boolean;
  bytes(id: number): Uint8Array;
}

export class Trie {
  /** First child and next sibling of each node; 0: none. The root is node 0. */
  readonly child: Int32Array;
  readonly sibling: Int32Array;
  readonly byte: Uint8Array;
  /** A token that ends at each node, and for each token the next one with the same bytes; -1: none. */
  readonly token: Int32Array;
  readonly same: Int32Array;
  /** Length of the longest token in bytes. */
  readonly depth: number;
  /** Bytes of each token; empty for special ones and ids without a token. */
  readonly bytes: readonly Uint8Array[];
  readonly special: readonly number[];
  /** 32-bit words of a mask over all ids of the model. */
  readonly words: number;

  private constructor(bytes: readonly Uint8Array[], special: readonly number[], nodes: number) {
    this.bytes = bytes;
    this.special = special;
    this.words = Math.ceil(bytes.length / 32);
    this.child = new Int32Array(nodes);
    this.sibling = new Int32Array(nodes);
    this.byte = new Uint8Array(nodes);
    this.token = new Int32Array(nodes).fill(-1);
    this.same = new Int32Array(bytes.length).fill(-1);
    this.depth = bytes.reduce((longest, b) => Math.max(longest, b.length), 0);
  }

  /** @param vocabSize of the model, which may have more rows than the tokenizer has tokens */
  static async build(vocabulary: Tokens, vocabSize: number): Promise<Trie> {
    const none = new Uint8Array(0);
    const bytes: Uint8Array[] = [];
    const special = vocabulary.specialIds.filter((id) => id < vocabSize);
    for (let id = 0; id < vocabSize; id++) {
      bytes.push(vocabulary.has(id) && !vocabulary.isSpecial(id) ? vocabulary.bytes(id) : none);
      if (id % TOKENS_A_PIECE === 0) await setImmediate();
    }
    const trie = new Trie(
      bytes,
      special,
      bytes.reduce((sum, b) => sum + b.length, 1),
    );
    let nodes = 1;
    for (const [id, token] of bytes.entries()) {
      if (token.length > 0) nodes = trie.#insert(id, token, nodes);
      if (id % TOKENS_A_PIECE === 0) await setImmediate();
    }
    return trie;
  }

  #insert(id: number, bytes: Uint8Array, nodes: number): number {
    let [node, count] = [0, nodes];
    for (const byte of bytes) {
      let next = this.child[node];
      while (next !== 0 && this.byte[next] !== byte) next = this.sibling[next];
      if (next === 0) {
        next = count++;
        this.byte[next] = byte;
        this.sibling[next] = this.child[node];
        this.child[node] = next;
      }
      node = next;
    }
    this.same[id] = this.token[node];
    this.token[node] = id;
    return count;
  }
}
