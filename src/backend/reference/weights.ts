/** Decodes stored weights of any format to float32. */
import { open } from "node:fs/promises";
import { fromF16, roundBf16, toF16 } from "../../tensor/dtype.ts";
import { isBlockDtype, locateElement, readElement, roundToBlocks } from "../../tensor/quantized.ts";
import { elements } from "../../tensor/shape.ts";
import { isPacked, PACK, PACK_BYTES } from "../../tensor/stored.ts";
import type { WeightSource } from "../backend.ts";

/** All numbers of a weight, rounded to the precision of the requested format. */
export async function readWeight(source: WeightSource): Promise<Float32Array> {
  const out = new Float32Array(elements(source.shape));
  const each = out.length / source.parts.length;
  for (const [i, part] of source.parts.entries()) {
    const bytes = Buffer.alloc(part.bytes);
    const file = await open(part.file);
    try {
      const { bytesRead } = await file.read(bytes, 0, part.bytes, part.offset);
      if (bytesRead !== part.bytes) throw new Error(`${part.file}: ends within the tensor ${source.name}`);
    } finally {
      await file.close();
    }
    decode(bytes, source, out.subarray(i * each, (i + 1) * each));
  }
  if (source.dtype === source.stored) return out;
  checkFinite(out, source);
  round(out, source);
  checkFinite(out, source);
  return out;
}

function checkFinite(values: Float32Array, { name, dtype, parts }: WeightSource): void {
  const at = values.findIndex((value) => !Number.isFinite(value));
  if (at >= 0)
    throw new Error(
      `${parts[0].file}: tensor ${name} holds ${values[at]} as ${dtype}, element ${at}: the file is damaged, or training had diverged`,
    );
}

/** Rounds in place to the precision of the requested format. */
function round(values: Float32Array, { dtype, shape }: WeightSource): void {
  const width = shape[shape.length - 1];
  if (dtype === "bf16") for (let i = 0; i < values.length; i++) values[i] = roundBf16(values[i]);
  if (dtype === "f16") for (let i = 0; i < values.length; i++) values[i] = fromF16(toF16(values[i]));
  if (isBlockDtype(dtype)) for (let i = 0; i < values.length; i += width) roundToBlocks(dtype, values.subarray(i, i + width));
}

/** Decodes stored numbers to float32. */
export function decode(bytes: Buffer, { stored, shape }: Pick<WeightSource, "stored" | "shape">, out: Float32Array): void {
  const k = shape[shape.length - 1];
  const word = new DataView(new ArrayBuffer(4));
  for (let i = 0; i < out.length; i++) {
    if (stored === "f32") out[i] = bytes.readFloatLE(i * 4);
    else if (stored === "f16") out[i] = fromF16(bytes.readUInt16LE(i * 2));
    else if (stored === "bf16") {
      word.setUint32(0, bytes.readUInt16LE(i * 2) << 16);
      out[i] = word.getFloat32(0);
    } else if (isBlockDtype(stored)) {
      out[i] = readElement(stored, bytes, locateElement(stored, k, Math.floor(i / k), i % k));
    } else if (isPacked(stored)) {
      const [block, at] = [Math.floor(i / PACK) * PACK_BYTES[stored], i % PACK];
      const nibbles = bytes[block + 2 + (at % (PACK / 2))];
      const number = stored === "q8_0" ? bytes.readInt8(block + 2 + at) : (at < PACK / 2 ? nibbles & 15 : nibbles >> 4) - 8;
      out[i] = number * fromF16(bytes.readUInt16LE(block));
    } else throw new Error(`internal: weights cannot be stored as ${stored}`);
  }
}
