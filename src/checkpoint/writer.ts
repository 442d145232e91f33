/**
 * Writes a safetensors file, one tensor at a time: header first, then the bytes, to a temporary name that is renamed
 * at the end, so readers see the complete file or none. Knows no model and no quantisation.
 */
import type { FileHandle } from "node:fs/promises";
import { resolve } from "node:path";
import { CheckpointError } from "./error.ts";
import { MAX_HEADER_BYTES, PREFIX_BYTES, STORED_BITS, type StoredDtype, storedBytes } from "./safetensors.ts";
import { CHUNK_BYTES, produced, writeAll, writeWhole } from "./stream.ts";

/** One tensor to write. `data` may be a function, called once when its turn comes, so that only one tensor is in memory at a time. */
export interface TensorData {
  readonly name: string;
  readonly dtype: StoredDtype;
  readonly shape: readonly number[];
  readonly data: Uint8Array | (() => Promise<Uint8Array>);
}

const ALIGNMENT_BYTES = 64;

export interface WriteOptions {
  /** The file's `__metadata__`; none by default. */
  readonly metadata?: Readonly<Record<string, string>>;
  /** How many `data` functions run at once, in file order; that many tensors are in memory. Default 1. */
  readonly concurrency?: number;
  /**
   * Write to `<path>.partial`, keep it on failure, and resume where an existing one ends. The tensors must be the same:
   * a partial file with another header is discarded. Default false.
   */
  readonly resumable?: boolean;
  /** Called with each tensor's bytes once they are in the file, including those already there when resuming. */
  readonly onWritten?: (name: string, data: Uint8Array) => void;
}

/**
 * Writes a safetensors file. The data starts at a multiple of 64, and tensors whose size is a multiple of 64 come first, so
 * each of them is aligned to 64 too; since the format allows no gaps, the others follow in order of decreasing alignment.
 * All names, dtypes and shapes are needed before the first byte; data is requested afterwards, in file order.
 * @throws CheckpointError for a bad tensor, data of the wrong size, or a full disk; errors of a `data` function pass
 * through. On failure nothing but a resumable part is left behind, and an existing file at `path` stays unchanged.
 */
export async function writeSafetensors(
  path: string,
  tensors: Iterable<TensorData> | AsyncIterable<TensorData>,
  { metadata, concurrency = 1, resumable = false, onWritten }: WriteOptions = {},
): Promise<void> {
  const file = resolve(path);
  const sized: Sized[] = [];
  for await (const tensor of tensors) sized.push({ tensor, bytes: checkedBytes(file, tensor) });
  sized.sort((a, b) => evenness(b.bytes) - evenness(a.bytes));
  const header = makeHeader(file, sized, metadata);
  const total = sized.reduce((sum, { bytes }) => sum + bytes, header.byteLength);

  await writeWhole(file, total, resumable, async (target) => {
    const kept = resumable ? await keptTensors(target, header, sized, onWritten) : 0;
    if (kept === 0) {
      await target.truncate(0);
      await writeAll(target, header, file, total);
    }
    const makers = sized.slice(kept).map(({ tensor: { data } }) => (typeof data === "function" ? data : () => Promise.resolve(data)));
    let next = kept;
    for await (const data of produced(makers, concurrency)) {
      const { tensor, bytes } = sized[next++];
      if (data.byteLength !== bytes) {
        throw new CheckpointError(
          file,
          `tensor ${tensor.name}: ${data.byteLength} bytes given, ${tensor.dtype} [${tensor.shape}] takes ${bytes}`,
        );
      }
      await writeAll(target, data, file, total);
      onWritten?.(tensor.name, data);
    }
  });
}

interface Sized {
  readonly tensor: TensorData;
  readonly bytes: number;
}

/** The number of complete tensors in a partial file; truncates the file after them. 0 if it has other tensors. */
async function keptTensors(
  handle: FileHandle,
  header: Buffer,
  sized: readonly Sized[],
  onWritten: WriteOptions["onWritten"],
): Promise<number> {
  const { size } = await handle.stat();
  const seen = Buffer.alloc(header.byteLength);
  if (size < header.byteLength || (await handle.read(seen, 0, seen.byteLength, 0)).bytesRead < seen.byteLength || !seen.equals(header))
    return 0;
  let kept = 0;
  let end = header.byteLength;
  for (; kept < sized.length && end + sized[kept].bytes <= size; kept++) {
    const { tensor, bytes } = sized[kept];
    if (onWritten) {
      const data = new Uint8Array(bytes);
      for (let done = 0; done < bytes; ) done += (await handle.read(data, done, Math.min(bytes - done, CHUNK_BYTES), end + done)).bytesRead;
      onWritten(tensor.name, data);
    }
    end += bytes;
  }
  await handle.truncate(end);
  return kept;
}

function checkedBytes(file: string, { name, dtype, shape }: TensorData): number {
  const bytes = Object.hasOwn(STORED_BITS, dtype) && shape.every((n) => n >= 0) ? storedBytes(dtype, shape) : undefined;
  if (bytes === undefined) throw new CheckpointError(file, `tensor ${name}: ${dtype} [${shape}] can't be stored`);
  return bytes;
}

/** The largest power of two, up to 64, that divides the size: the alignment that the tensor preserves for the next one. */
function evenness(bytes: number): number {
  for (let power = ALIGNMENT_BYTES; power > 1; power /= 2) if (bytes % power === 0) return power;
  return 1;
}

function makeHeader(file: string, sized: readonly Sized[], metadata: Readonly<Record<string, string>> | undefined): Buffer {
  const entries = new Map<string, unknown>();
  if (metadata) entries.set("__metadata__", metadata);
  let offset = 0;
  for (const { tensor, bytes } of sized) {
    if (tensor.name === "__metadata__") throw new CheckpointError(file, "a tensor can't be named __metadata__");
    if (entries.has(tensor.name)) throw new CheckpointError(file, `two tensors are named ${tensor.name}`);
    entries.set(tensor.name, { dtype: tensor.dtype, shape: tensor.shape, data_offsets: [offset, offset + bytes] });
    offset += bytes;
  }
  const json = Buffer.from(JSON.stringify(Object.fromEntries(entries)));
  const padded = Math.ceil((PREFIX_BYTES + json.byteLength) / ALIGNMENT_BYTES) * ALIGNMENT_BYTES;
  if (padded - PREFIX_BYTES > MAX_HEADER_BYTES) throw new CheckpointError(file, `a header of ${padded} bytes is beyond the format's limit`);
  const header = Buffer.alloc(padded, 0x20);
  header.writeBigUInt64LE(BigInt(padded - PREFIX_BYTES));
  json.copy(header, PREFIX_BYTES);
  return header;
}
