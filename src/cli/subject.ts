/** The command's handle on a process that holds a model to measure: starts it, asks it and ends it. */
import { type ChildProcess, fork } from "node:child_process";
import { fileURLToPath } from "node:url";
import type { LoadOptions } from "../api/load.ts";
import type { MachineLimits } from "../backend/native.ts";
import { UsageError } from "./failure.ts";
import type { Loaded, MemoryUse, Profile, Reply, Request } from "./probe.ts";

/** What to load, and how. */
export interface Setting {
  /** As the user named the model. */
  readonly model: string;
  readonly folder: string;
  readonly options: LoadOptions;
}

/** The reply to each kind of request. */
interface Replies {
  readonly limits: MachineLimits;
  readonly load: Loaded;
  /** Seconds. */
  readonly prompt: number;
  /** Seconds for all new tokens but the first. */
  readonly generate: number;
  readonly profile: Profile;
  readonly memory: MemoryUse;
}

export class Subject {
  readonly loaded: Loaded;
  readonly #child: ChildProcess;
  readonly #signal: AbortSignal;

  private constructor(child: ChildProcess, signal: AbortSignal, loaded: Loaded) {
    this.#child = child;
    this.#signal = signal;
    this.loaded = loaded;
  }

  /** Starts a process and loads the model in it. Throws UsageError, in one line, when the model can't be loaded. */
  static async start({ folder, options }: Setting, signal: AbortSignal): Promise<Subject> {
    signal.throwIfAborted();
    // The same extension as this file, which runs both from source and as built.
    const probe = fileURLToPath(new URL(import.meta.url.endsWith(".ts") ? "probe.ts" : "probe.js", import.meta.url));
    const child = fork(probe, { stdio: ["ignore", "ignore", "inherit", "ipc"] });
    try {
      return new Subject(child, signal, await ask(child, { kind: "load", folder, options }, signal));
    } catch (error) {
      child.kill("SIGKILL");
      throw error;
    }
  }

  ask<R extends Request>(request: R): Promise<Replies[R["kind"]]> {
    return ask(this.#child, request, this.#signal);
  }

  stop(): void {
    this.#child.kill("SIGKILL");
  }
}

function ask<R extends Request>(child: ChildProcess, request: R, signal: AbortSignal): Promise<Replies[R["kind"]]> {
  return new Promise((resolve, reject) => {
    const settle = (act: () => void) => {
      child.off("message", onMessage).off("exit", onExit).off("error", onError);
      signal.removeEventListener("abort", onAbort);
      act();
    };
    const onMessage = (reply: Reply) =>
      settle(() => ("error" in reply ? reject(new UsageError(reply.error)) : resolve(reply.value as Replies[R["kind"]])));
    const onExit = (code: number | null, by: string | null) => {
      const hint = by === "SIGKILL" ? "; perhaps it ran out of memory" : "";
      settle(() => reject(new UsageError(`the process that held the model ended (${by ?? `exit code ${code}`})${hint}`)));
    };
    const onError = (error: Error) => settle(() => reject(error));
    const onAbort = () => settle(() => reject(signal.reason));
    child.on("message", onMessage).on("exit", onExit).on("error", onError);
    signal.addEventListener("abort", onAbort);
    if (signal.aborted) onAbort();
    else child.send(request, (error) => error && onError(error));
  });
}
