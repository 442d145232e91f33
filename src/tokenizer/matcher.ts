// Finds fixed strings in a text, leftmost-longest. Knows nothing of tokens.

interface Node {
  readonly next: Map<number, Node>; // by UTF-16 unit
  end: boolean;
}

/** A set of fixed strings, searched together. Empty strings are ignored. */
export class Matcher {
  private readonly root: Node = { next: new Map(), end: false };

  constructor(words: Iterable<string>) {
    for (const word of words) {
      if (word === "") continue;
      let node = this.root;
      for (let i = 0; i < word.length; i++) {
        const unit = word.charCodeAt(i);
        let child = node.next.get(unit);
        if (child === undefined) node.next.set(unit, (child = { next: new Map(), end: false }));
        node = child;
      }
      node.end = true;
    }
  }

  get empty(): boolean {
    return this.root.next.size === 0;
  }

  /** The end of the longest word that starts at `at`, or -1. */
  longest(text: string, at: number): number {
    let end = -1;
    let node = this.root.next.get(text.charCodeAt(at));
    for (let i = at + 1; node !== undefined; i++) {
      if (node.end) end = i;
      node = i < text.length ? node.next.get(text.charCodeAt(i)) : undefined;
    }
    return end;
  }
}
