/** How much memory this process may use. */
import { freemem, totalmem } from "node:os";
import type { Memory } from "./backend.ts";

export function hostMemory(): Memory {
  return { total: totalmem(), free: freemem() };
}
