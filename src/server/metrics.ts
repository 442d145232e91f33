/** What operators see: numbers for Prometheus. Every name is used by the dashboard in deploy/grafana. Knows no route and no model's content. */
import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from "prom-client";
import type { ErrorCode } from "./errors.ts";
import type { Observer, ServedModel } from "./served.ts";

const LATENCY = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120];
const SHORT = [0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56];
const POWERS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024];

/** What is asked at the moment when the numbers are wanted. */
export interface Sources {
  inProgress(): { readonly running: number; readonly queued: number };
  models(): Iterable<ServedModel>;
}

interface Reporting {
  onStep?: (report: { readonly seconds: number; readonly rows: number; readonly sequences: number }) => void;
}

export class Metrics {
  readonly #registry = new Registry();
  readonly #requests: Counter;
  readonly #seconds: Histogram;
  readonly #refusals: Counter;
  readonly #queue: Histogram;
  readonly #firstToken: Histogram;
  readonly #betweenTokens: Histogram;
  readonly #promptTokens: Counter;
  readonly #cachedTokens: Counter;
  readonly #generatedTokens: Counter;
  readonly #stepSeconds: Histogram;
  readonly #stepRows: Histogram;
  readonly #stepSequences: Histogram;
  #sources: Sources = { inProgress: () => ({ running: 0, queued: 0 }), models: () => [] };

  constructor() {
    const registers = [this.#registry];
    collectDefaultMetrics({ register: this.#registry });
    const counter = (name: string, help: string, ...labelNames: string[]) => new Counter({ name, help, labelNames, registers });
    const histogram = (name: string, help: string, buckets: number[], ...labelNames: string[]) =>
      new Histogram({ name, help, labelNames, buckets, registers });
    this.#requests = counter("mixtape_requests_total", "HTTP requests answered", "method", "route", "status");
    this.#seconds = histogram("mixtape_request_seconds", "Time from a request's headers to the end of its answer", LATENCY, "route");
    this.#refusals = counter("mixtape_refusals_total", "Requests not let in, by reason", "code");
    this.#queue = histogram("mixtape_queue_seconds", "Time that admitted requests waited for a place", LATENCY);
    this.#firstToken = histogram("mixtape_time_to_first_token_seconds", "Time from a request to its first token", LATENCY, "model");
    this.#betweenTokens = histogram("mixtape_time_between_tokens_seconds", "Time from one token of an answer to the next", SHORT, "model");
    this.#promptTokens = counter("mixtape_prompt_tokens_total", "Tokens of prompts", "model");
    this.#cachedTokens = counter("mixtape_cached_prompt_tokens_total", "Tokens of prompts that the prefix cache had", "model");
    this.#generatedTokens = counter("mixtape_generated_tokens_total", "Tokens of answers", "model");
    this.#stepSeconds = histogram("mixtape_step_seconds", "Time of one step of the model", SHORT, "model");
    this.#stepRows = histogram("mixtape_step_rows", "Tokens computed in one step", POWERS, "model");
    this.#stepSequences = histogram("mixtape_step_sequences", "Requests that shared one step", POWERS, "model");
    this.#gaugeSources(registers);
  }

  set sources(sources: Sources) {
    this.#sources = sources;
  }

  get contentType(): string {
    return this.#registry.contentType;
  }

  /** In the text format of Prometheus. */
  text(): Promise<string> {
    return this.#registry.metrics();
  }

  answered(method: string, route: string, status: number, seconds: number): void {
    this.#requests.inc({ method, route, status });
    this.#seconds.observe({ route }, seconds);
  }

  refused(code: ErrorCode): void {
    this.#refusals.inc({ code });
  }

  queued(seconds: number): void {
    this.#queue.observe(seconds);
  }

  /** Counts the steps of a model from now on. */
  attach({ name: model, engine }: ServedModel): void {
    (engine as Reporting).onStep = ({ seconds, rows, sequences }) => {
      this.#stepSeconds.observe({ model }, seconds);
      this.#stepRows.observe({ model }, rows);
      this.#stepSequences.observe({ model }, sequences);
    };
  }

  /** Watches one answer; `charge` is told of tokens as they are used. */
  observe(model: string, charge: (tokens: number) => void): Observer {
    let last = performance.now();
    let first = true;
    return {
      prompt: (tokens, cachedTokens) => {
        this.#promptTokens.inc({ model }, tokens);
        this.#cachedTokens.inc({ model }, cachedTokens);
        charge(tokens);
      },
      token: () => {
        const now = performance.now();
        (first ? this.#firstToken : this.#betweenTokens).observe({ model }, (now - last) / 1000);
        this.#generatedTokens.inc({ model });
        charge(1);
        first = false;
        last = now;
      },
    };
  }

  #gaugeSources(registers: Registry[]): void {
    const self = this;
    const gauge = (name: string, help: string, labelNames: string[], collect: (this: Gauge) => void) =>
      new Gauge({ name, help, labelNames, registers, collect });
    gauge("mixtape_requests_in_progress", "Requests inside, by whether they are computed or wait", ["state"], function () {
      const { running, queued } = self.#sources.inProgress();
      this.set({ state: "running" }, running);
      this.set({ state: "queued" }, queued);
    });
    gauge("mixtape_kv_blocks", "Blocks of the KV cache, by what they are used for", ["model", "state"], function () {
      this.reset();
      for (const { name, engine } of self.#sources.models()) {
        this.set({ model: name, state: "free" }, engine.cache.free);
        this.set({ model: name, state: "used" }, engine.cache.count - engine.cache.free);
      }
    });
    gauge("mixtape_models_loaded", "1 for each model in memory", ["model"], function () {
      this.reset();
      for (const { name } of self.#sources.models()) this.set({ model: name }, 1);
    });
  }
}
