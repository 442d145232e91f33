/** What `mixtape info --devices` shows: the processor, the GPUs and their driver, and why a GPU cannot be used. Opens no device. */
import { cpus } from "node:os";
import { kvCacheName } from "../api/kv.ts";
import { physicalCores } from "../backend/cores.ts";
import { CPU_DEFAULTS } from "../backend/cpu.ts";
import { CUDA_DEFAULTS, type CudaSystem, cudaSystem } from "../backend/cuda/cuda.ts";
import { hostMemory } from "../backend/memory.ts";
import { instructionSets } from "../backend/native.ts";
import { colours, formatBytes, padEnd } from "./terminal.ts";

export type Devices = ReturnType<typeof devices>;

/** @param system what there is of CUDA */
export function devices(system: CudaSystem = cudaSystem()) {
  const [best] = instructionSets();
  return {
    cpu: {
      device: "cpu",
      name: cpus()[0]?.model.trim() ?? "unknown",
      instruction_set: process.env["MIXTAPE_ISA"] || best,
      cores: physicalCores(),
      memory: hostMemory(),
      kv_cache_dtypes: CPU_DEFAULTS.kvDtypes.map(kvCacheName),
      trains: true,
    },
    cuda: {
      /** Null if a card can be used. */
      refused: system.refused || null,
      /** The newest CUDA that the driver supports, and the one that mixtape was built with. */
      driver: system.driver,
      runtime: system.runtime,
      kv_cache_dtypes: CUDA_DEFAULTS.kvDtypes.map(kvCacheName),
      trains: false,
      cards: system.cards.map(({ name, major, minor, multiprocessors, total, free, refused }, i) => ({
        device: `cuda:${i}`,
        name,
        compute_capability: `${major}.${minor}`,
        multiprocessors,
        memory: { total, free: refused ? null : free },
        refused: refused || null,
      })),
    },
  };
}

export function describeDevices({ cpu, cuda }: Devices): string {
  const { bold, dim } = colours(process.stdout);
  const row = (name: string, value: string) => `  ${padEnd(name, 22)}${value}`;
  const memory = ({ total, free }: { readonly total: number; readonly free: number | null }) =>
    free === null ? formatBytes(total) : `${formatBytes(free)} of ${formatBytes(total)} free`;
  const cores = `${cpu.cores} core${cpu.cores === 1 ? "" : "s"}`;
  const lines = [
    `${bold("cpu")}  ${cpu.name}`,
    row("computes with", `${cpu.instruction_set}, ${cores}`),
    row("memory", memory(cpu.memory)),
    row("KV cache formats", cpu.kv_cache_dtypes.join(", ")),
  ];
  for (const card of cuda.cards)
    lines.push(
      "",
      `${bold(card.device)}  ${card.name}`,
      row("compute capability", `${card.compute_capability}, ${card.multiprocessors} multiprocessors`),
      row("memory", memory(card.memory)),
      row("KV cache formats", cuda.kv_cache_dtypes.join(", ")),
      row("trains", "no: training runs on the CPU"),
      row("usable", usable(cuda.refused, card.refused)),
    );
  if (cuda.cards.length === 0) lines.push("", `${bold("cuda")}  ${cuda.refused}`);
  if (cuda.runtime !== null)
    lines.push("", dim(`CUDA: built with ${cuda.runtime}, ${cuda.driver === null ? "no driver" : `the driver supports ${cuda.driver}`}`));
  return `${lines.join("\n")}\n`;
}

/** One card may be usable where another is not; an old driver is in the way of all. */
function usable(system: string | null, card: string | null): string {
  if (card !== null) return `no: ${card}`;
  return system === null ? "yes" : `no: ${system}`;
}
