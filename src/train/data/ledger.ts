/** What is known of every example of a data set: where its row is, how long it is. About 30 bytes for each, whatever the example's size. */

/** What is noted of an example. */
export interface Entry {
  /** Of the list of files. */
  readonly file: number;
  readonly offset: number;
  /** Bytes of the row. */
  readonly bytes: number;
  readonly line: number;
  /** Which of the row's examples. */
  readonly part: number;
  readonly tokens: number;
  /** Tokens that are learnt. */
  readonly trained: number;
  /** A hash of what the model reads of the row. */
  readonly input: number;
}

const FIELDS = ["file", "bytes", "line", "part", "tokens", "trained", "input"] as const;
type Whole = (typeof FIELDS)[number];

export class Ledger {
  #length = 0;
  #capacity = 1024;
  #offset = new Float64Array(this.#capacity);
  readonly #columns = Object.fromEntries(FIELDS.map((name) => [name, new Uint32Array(this.#capacity)])) as Record<Whole, Uint32Array>;

  get length(): number {
    return this.#length;
  }

  push(entry: Entry): void {
    if (this.#length === this.#capacity) this.#grow();
    this.#offset[this.#length] = entry.offset;
    for (const name of FIELDS) this.#columns[name][this.#length] = entry[name];
    this.#length++;
  }

  at(i: number): Entry {
    const { file, bytes, line, part, tokens, trained, input } = this.#columns;
    return {
      offset: this.#offset[i],
      file: file[i],
      bytes: bytes[i],
      line: line[i],
      part: part[i],
      tokens: tokens[i],
      trained: trained[i],
      input: input[i],
    };
  }

  /** One number of an entry. */
  get(name: Whole, i: number): number {
    return this.#columns[name][i];
  }

  #grow(): void {
    this.#capacity *= 2;
    const offset = new Float64Array(this.#capacity);
    offset.set(this.#offset);
    this.#offset = offset;
    for (const name of FIELDS) {
      const column = new Uint32Array(this.#capacity);
      column.set(this.#columns[name]);
      this.#columns[name] = column;
    }
  }
}
