/** The names of devices. Opens none. */
const CUDA = /^cuda(?::(\d{1,3}))?$/;

/** Whether `name` is a device; not whether this machine has it. */
export function isDevice(name: string): boolean {
  return ["auto", "cpu", "reference"].includes(name) || CUDA.test(name);
}

/** For error messages. */
export const DEVICES = "auto, cpu, cuda, cuda:0, cuda:1, ..., reference";

/** Which card `cuda` or `cuda:1` names. */
export function cardOf(device: string): number {
  return Number(CUDA.exec(device)?.[1] ?? 0);
}
