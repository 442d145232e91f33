/** Names of the KV cache's formats: those of options, and those of the engine. Knows no model and loads nothing. */
import type { KvDtype } from "../tensor/dtype.ts";

/** The engine's name of each value of `kv_cache_dtype`. */
export const KV_DTYPES = { fp32: "f32", fp16: "f16", bf16: "bf16", int8: "int8kv", fp8: "fp8kv" } as const satisfies Record<
  string,
  KvDtype
>;
export type KvCacheDtype = keyof typeof KV_DTYPES;
export const KV_CACHE_DTYPES = Object.keys(KV_DTYPES) as KvCacheDtype[];

/** The option's name of a cache format. */
export function kvCacheName(dtype: KvDtype): KvCacheDtype {
  return KV_CACHE_DTYPES.find((name) => KV_DTYPES[name] === dtype) as KvCacheDtype;
}
