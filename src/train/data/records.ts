/**
 * Finds where the records of a text file begin and end, in one pass over its bytes: lines of JSONL, elements of a JSON array, rows of a CSV
 * table, pieces of plain text. Holds no more than one record in memory. Knows nothing of what a record says.
 */
import { createReadStream } from "node:fs";
import { DataError } from "./fault.ts";

export interface Extent {
  /** In bytes from the file's beginning. */
  readonly offset: number;
  readonly length: number;
  /** The line on which the record begins, from 1. */
  readonly line: number;
}

export interface Scanned extends Extent {
  /** Null for a record that is longer than the limit. */
  readonly bytes: Uint8Array | null;
}

/** Reads a file's bytes one after the other, and tells where a record begins and where it has ended. */
export interface Splitter {
  /** What this byte is: outside of any record, the first of one, within one, the last of one (alone or not), or the first behind one. */
  next(byte: number): "outside" | "inside" | "last" | "behind";
  /** Throws DataError, or returns the reason why the record that the file ends in is broken; null where it is whole. */
  end(inside: boolean): string | null;
}

const [NEWLINE, RETURN, SPACE, TAB, QUOTE, BACKSLASH] = [10, 13, 32, 9, 34, 92];
const [OPEN_LIST, CLOSE_LIST, OPEN_OBJECT, CLOSE_OBJECT, COMMA] = [91, 93, 123, 125, 44];

function isSpace(byte: number): boolean {
  return byte === SPACE || byte === NEWLINE || byte === RETURN || byte === TAB;
}

/** Each line that is not blank. */
export function lines(): Splitter {
  let inside = false;
  return {
    next(byte) {
      if (byte === NEWLINE) {
        const was = inside;
        inside = false;
        return was ? "behind" : "outside";
      }
      if (!inside && isSpace(byte)) return "outside";
      inside = true;
      return "inside";
    },
    end: () => null,
  };
}

/** Each element of a JSON array. @param path for errors */
export function elements(path: string): Splitter {
  let [depth, inString, escaped, ended] = [0, false, false, false];
  /** Inside an element that is no list, object or text: a number or a word. */
  let bare = false;
  return {
    next(byte) {
      if (ended) {
        if (!isSpace(byte)) throw new DataError(`${path}: there is more behind the end of the JSON array`);
        return "outside";
      }
      if (inString) {
        if (escaped) escaped = false;
        else if (byte === BACKSLASH) escaped = true;
        else if (byte === QUOTE) inString = false;
        return !inString && depth === 1 ? "last" : "inside";
      }
      if (depth === 0) {
        if (isSpace(byte)) return "outside";
        if (byte !== OPEN_LIST)
          throw new DataError(`${path}: not a JSON array: it must begin with [ (one object a line is JSONL: give format: jsonl)`);
        depth = 1;
        return "outside";
      }
      if (depth === 1 && (byte === COMMA || byte === CLOSE_LIST || isSpace(byte))) {
        const was = bare;
        bare = false;
        ended = byte === CLOSE_LIST;
        return was ? "behind" : "outside";
      }
      if (byte === QUOTE) inString = true;
      else if (byte === OPEN_LIST || byte === OPEN_OBJECT) depth++;
      else if (byte === CLOSE_LIST || byte === CLOSE_OBJECT) {
        depth--;
        return depth === 1 ? "last" : "inside";
      } else if (depth === 1) bare = true;
      return "inside";
    },
    end() {
      if (depth === 0) throw new DataError(`${path}: the file is empty: it must be a JSON array`);
      return ended ? null : "the file ends inside the JSON array: it was cut off";
    },
  };
}

/** Each row of a table, a line unless a field in quotes has line breaks (RFC 4180). @param quoted fields may be in quotes */
export function tableRows(delimiter: number, quoted: boolean): Splitter {
  let [inside, atStart, inQuotes, closing] = [false, true, false, false];
  return {
    next(byte) {
      if (inQuotes && !closing) {
        if (byte === QUOTE) closing = true; // or the first of two that stand for one
        return "inside";
      }
      if (inQuotes && byte === QUOTE) {
        closing = false;
        return "inside";
      }
      inQuotes = closing = false;
      if (byte === NEWLINE) {
        const was = inside;
        [inside, atStart] = [false, true];
        return was ? "behind" : "outside";
      }
      if (!inside && byte === RETURN) return "outside";
      if (quoted && atStart && byte === QUOTE) inQuotes = true;
      atStart = byte === delimiter;
      inside = true;
      return "inside";
    },
    end: () => (inQuotes && !closing ? "a quote that opens in this row is never closed" : null),
  };
}

/** Bytes of a piece of plain text. */
const PIECE = 64 * 1024;

/** Pieces of plain text: all of it, or from 64 KiB on up to the next end of a line. */
export function pieces(): Splitter {
  let length = 0;
  return {
    next(byte) {
      length++;
      if (length < PIECE || byte !== NEWLINE) return "inside";
      length = 0;
      return "last";
    },
    end: () => null,
  };
}

/** What is wrong with the end of the file, as a record of its own. */
export interface Broken extends Extent {
  readonly reason: string;
}

/**
 * The records of a file, in order. A mark of UTF-8's byte order is skipped.
 * @param most bytes of a record
 */
export async function* scan(path: string, splitter: Splitter, most: number): AsyncGenerator<Scanned | Broken> {
  let position = 0;
  let line = 1;
  /** Of the record that is being read; -1: none. */
  let [start, startLine] = [-1, 0];
  /** Bytes of that record in earlier chunks; their total length. */
  let held: Uint8Array[] = [];
  let heldLength = 0;
  const record = (end: number, chunk: Uint8Array, base: number): Scanned => {
    const length = end - start;
    const rest = chunk.subarray(Math.max(start, base) - base, end - base);
    const bytes = length > most ? null : held.length === 0 ? rest : Buffer.concat([...held, rest]);
    const extent = { offset: start, length, line: startLine, bytes };
    [start, held, heldLength] = [-1, [], 0];
    return extent;
  };
  for await (const read of createReadStream(path, { highWaterMark: 1 << 18 })) {
    const chunk = read as Uint8Array;
    const base = position;
    let from = 0;
    if (base === 0 && chunk[0] === 0xef && chunk[1] === 0xbb && chunk[2] === 0xbf) from = 3;
    for (let i = from; i < chunk.length; i++) {
      const byte = chunk[i];
      const state = splitter.next(byte);
      if (start < 0 && state !== "outside" && state !== "behind") [start, startLine] = [base + i, line];
      if (state === "behind") yield record(base + i, chunk, base);
      else if (state === "last") yield record(base + i + 1, chunk, base);
      if (byte === NEWLINE) line++;
    }
    position += chunk.length;
    if (start >= 0 && heldLength <= most) {
      const rest = chunk.slice(Math.max(start, base) - base);
      held.push(rest);
      heldLength += rest.length;
    }
    if (heldLength > most) held = []; // the record is too long already
  }
  const reason = splitter.end(start >= 0);
  if (reason !== null)
    yield { offset: Math.max(0, start), length: position - Math.max(0, start), line: start < 0 ? line : startLine, reason };
  else if (start >= 0) yield record(position, new Uint8Array(0), position);
}
