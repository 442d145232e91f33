/** Progress bars on standard error for downloads and conversions; none if the environment disables them. */
import type { DownloadProgress } from "../checkpoint/hub.ts";
import { formatBytes } from "./terminal.ts";

/** HF_HUB_DISABLE_PROGRESS_BARS, interpreted as other hub tools do. */
function disabled(): boolean {
  return /^(1|true|yes|on)$/i.test(process.env["HF_HUB_DISABLE_PROGRESS_BARS"] ?? "");
}

const NONE = { update: () => {}, stop: () => {} };
const STYLE = { barCompleteChar: "━", barIncompleteChar: "╌", hideCursor: true, clearOnComplete: false, stream: process.stderr };

/** A running display. Call `stop` at the end, even after an error: it restores the cursor. */
export interface Progress<T> {
  update(state: T): void;
  stop(): void;
}

/** One bar per file. Without a terminal: one line for each file that is complete. */
export async function downloadProgress(): Promise<Progress<DownloadProgress>> {
  if (disabled()) return NONE;
  if (!process.stderr.isTTY) {
    return {
      update: ({ file, loadedBytes, totalBytes, files }) => {
        if (loadedBytes === totalBytes)
          process.stderr.write(`fetched ${file} (${formatBytes(totalBytes)}, ${files.done} of ${files.total} files)\n`);
      },
      stop: () => {},
    };
  }
  const { default: cliProgress } = await import("cli-progress");
  const format = "{name} {bar} {percentage}%  {loaded} of {size}  {eta_formatted} left";
  const bars = new cliProgress.MultiBar({ ...STYLE, format, barsize: 28, etaBuffer: 50, forceRedraw: true });
  const byFile = new Map<string, ReturnType<typeof bars.create>>();
  return {
    update: ({ file, loadedBytes, totalBytes }) => {
      const state = {
        name: file.length > 34 ? `${file.slice(0, 33)}…` : file.padEnd(34),
        loaded: formatBytes(loadedBytes),
        size: formatBytes(totalBytes),
      };
      let bar = byFile.get(file);
      if (!bar) byFile.set(file, (bar = bars.create(totalBytes, loadedBytes, state)));
      bar.update(loadedBytes, state);
    },
    stop: () => bars.stop(),
  };
}

/** One bar over bytes, with the time left. Nothing without a terminal. */
export async function byteProgress(verb: string): Promise<Progress<{ doneBytes: number; totalBytes: number }>> {
  if (disabled() || !process.stderr.isTTY) return NONE;
  const { default: cliProgress } = await import("cli-progress");
  const bar = new cliProgress.SingleBar({
    ...STYLE,
    format: `${verb} {bar} {percentage}%  {done} of {size}  {eta_formatted} left`,
    barsize: 34,
    etaBuffer: 50,
  });
  let started = false;
  return {
    update: ({ doneBytes, totalBytes }) => {
      const state = { done: formatBytes(doneBytes), size: formatBytes(totalBytes) };
      if (!started) bar.start(totalBytes, doneBytes, state);
      else bar.update(doneBytes, state);
      started = true;
    },
    stop: () => {
      if (started) bar.stop();
    },
  };
}

/** One bar over rows; a count where their number is not known yet. Nothing without a terminal. */
export async function rowProgress(): Promise<Progress<{ what: string; done: number; total: number }>> {
  if (disabled() || !process.stderr.isTTY) return NONE;
  const { default: cliProgress } = await import("cli-progress");
  const bar = new cliProgress.SingleBar({
    ...STYLE,
    format: "{what} {bar} {value} of {total} rows  {eta_formatted} left",
    barsize: 34,
    etaBuffer: 50,
  });
  let started = false;
  return {
    update: ({ what, done, total }) => {
      if (total === 0) process.stderr.write(`\r${what}: ${done} rows`);
      else if (started) bar.update(done, { what });
      else bar.start(total, done, { what });
      started ||= total > 0;
    },
    stop: () => {
      if (started) bar.stop();
    },
  };
}
