/** The routing view: the experts that each token of an answer used, layer by layer, live and afterwards. */
import { useEffect, useId, useLayoutEffect, useRef, useState } from "preact/hooks";
import type { Message } from "./conversation.ts";
import { type Cell, cellAt, coloursOf, type Heat, paint } from "./heatmap.ts";
import { Icon } from "./icons.tsx";
import { formatNumber, usePage, useView } from "./page.ts";
import type { Trace } from "./trace.ts";

export interface ExpertsParts {
  /** The answer to show; null while there is none. */
  readonly answer: Message | null;
  readonly onClose: () => void;
}

export function Experts({ answer, onClose }: ExpertsParts) {
  const { session, say } = usePage();
  useView(session);
  const id = useId();
  const trace = answer ? session.trace(answer.id) : null;
  const known = answer && trace ? session.experts(answer.model) : null;
  return (
    <aside class="panel experts" aria-labelledby={id}>
      <header class="panel-head">
        <h2 id={id}>{say("routingTitle")}</h2>
        <button type="button" class="quiet square" aria-label={say("close")} onClick={onClose}>
          <Icon name="close" />
        </button>
      </header>
      <div class="panel-body">
        {answer && trace && trace.length > 0 ? (
          <TraceView key={answer.id} trace={trace} experts={Math.max(known ?? 0, trace.leastExperts)} />
        ) : (
          <p class="quiet-text">{say("routingEmpty")}</p>
        )}
      </div>
    </aside>
  );
}

interface TraceParts {
  readonly trace: Trace;
  /** Number of experts in a layer. */
  readonly experts: number;
}

function TraceView({ trace, experts }: TraceParts) {
  const { say } = usePage();
  /** Null follows the latest token. */
  const [picked, setPicked] = useState<number | null>(null);
  const token = Math.min(picked ?? trace.length - 1, trace.length - 1);
  const choices = trace.choices(token);
  const heat: Heat = {
    layers: trace.layers,
    experts,
    load: trace.load(experts),
    outlined: choices.map((choice) => choice.map(({ expert }) => expert)),
  };
  return (
    <>
      <p class="hint">{say("routingExplained")}</p>
      <HeatMap heat={heat} tokens={trace.length} />
      <div class="row between token-head">
        <h3>{say("routingToken", { index: token + 1, count: trace.length })}</h3>
        <button type="button" class="quiet" disabled={picked === null} onClick={() => setPicked(null)}>
          {say("routingFollow")}
        </button>
      </div>
      <Tokens trace={trace} count={trace.length} token={token} follow={picked === null} onPick={setPicked} />
      <table class="choices">
        <caption>{say("routingChoices")}</caption>
        <thead>
          <tr>
            <th scope="col">{say("layer")}</th>
            <th scope="col">{say("expertsAndWeights")}</th>
          </tr>
        </thead>
        <tbody>
          {choices.map((choice, i) => (
            <tr key={trace.layers[i]}>
              <th scope="row">{trace.layers[i]}</th>
              <td>
                <Weights choice={choice} />
              </td>
            </tr>
          ))}
        </tbody>
      </table>
      <details class="load">
        <summary>{say("routingLoad")}</summary>
        <LoadTable heat={heat} />
      </details>
    </>
  );
}

function Weights({ choice }: { readonly choice: ReturnType<Trace["choices"]>[number] }) {
  const { language } = usePage();
  return (
    <ul class="weights">
      {choice.map(({ expert, weight }) => (
        <li key={expert}>
          <span class="weight-expert">{expert}</span> <span class="weight-value">{formatNumber(weight, language, 2)}</span>
          <span class="weight-bar" aria-hidden="true">
            <span style={{ width: `${Math.min(1, Math.max(0, weight)) * 100}%` }} />
          </span>
        </li>
      ))}
    </ul>
  );
}

function HeatMap({ heat, tokens }: { readonly heat: Heat; readonly tokens: number }) {
  const { say, theme } = usePage();
  const canvas = useRef<HTMLCanvasElement>(null);
  const newest = useRef(heat);
  newest.current = heat;
  const [under, setUnder] = useState<Cell | null>(null);
  const colour = useRef<((name: string) => string) | null>(null);
  const draw = () => {
    if (!canvas.current?.parentElement) return;
    colour.current ??= coloursOf(canvas.current.parentElement);
    paint(canvas.current, newest.current, colour.current);
  };
  useLayoutEffect(draw, [heat, theme]);
  useEffect(() => {
    const sizes = new ResizeObserver(draw);
    if (canvas.current) sizes.observe(canvas.current.parentElement as Element);
    const dark = matchMedia("(prefers-color-scheme: dark)");
    dark.addEventListener("change", draw);
    return () => {
      sizes.disconnect();
      dark.removeEventListener("change", draw);
    };
  }, []);
  const count = under && heat.load[under.layer * heat.experts + under.expert];
  return (
    <figure class="heat">
      <canvas
        ref={canvas}
        role="img"
        aria-label={say("routingPicture", { layers: heat.layers.length, experts: heat.experts, tokens })}
        onMouseMove={(event) => setUnder(cellAt(event.currentTarget, heat, event.offsetX, event.offsetY))}
        onMouseLeave={() => setUnder(null)}
      />
      <figcaption class="hint" aria-hidden="true">
        {under
          ? say("cell", { layer: heat.layers[under.layer], expert: under.expert, count: count ?? 0 })
          : `${say("layer")} ↓ · ${say("expert")} →`}
      </figcaption>
    </figure>
  );
}

interface TokensParts {
  readonly trace: Trace;
  readonly count: number;
  readonly token: number;
  /** Whether to keep the latest token in view. */
  readonly follow: boolean;
  readonly onPick: (token: number) => void;
}

/** The answer as a list of tokens, one of them selected. Elements are appended directly, since an answer may have thousands. */
function Tokens({ trace, count, token, follow, onPick }: TokensParts) {
  const { say } = usePage();
  const list = useRef<HTMLDivElement>(null);
  const id = useId();
  useLayoutEffect(() => {
    const element = list.current;
    if (!element) return;
    for (let i = element.childElementCount; i < count; i++) {
      const option = document.createElement("span");
      option.id = `${id}-${i}`;
      option.setAttribute("role", "option");
      option.className = "token";
      option.dataset["token"] = String(i);
      option.textContent = shownText(trace.texts[i]);
      element.append(option);
    }
    element.querySelector("[aria-selected=true]")?.removeAttribute("aria-selected");
    const chosen = element.children[token] as HTMLElement | undefined;
    chosen?.setAttribute("aria-selected", "true");
    if (!chosen || (!follow && document.activeElement !== element)) return;
    const [top, bottom] = [chosen.offsetTop, chosen.offsetTop + chosen.offsetHeight];
    if (top < element.scrollTop || bottom > element.scrollTop + element.clientHeight) element.scrollTop = top - element.clientHeight / 2;
  }, [trace, count, token, follow]);
  return (
    <div
      ref={list}
      class="tokens"
      role="listbox"
      tabIndex={0}
      aria-label={say("routingTokens")}
      aria-activedescendant={`${id}-${token}`}
      onClick={(event) => {
        const picked = (event.target as HTMLElement).dataset["token"];
        if (picked !== undefined) onPick(Number(picked));
      }}
      onKeyDown={(event) => {
        const to = { ArrowLeft: token - 1, ArrowUp: token - 1, ArrowRight: token + 1, ArrowDown: token + 1, Home: 0, End: count - 1 }[
          event.key
        ];
        if (to === undefined) return;
        event.preventDefault();
        onPick(Math.min(count - 1, Math.max(0, to)));
      }}
    />
  );
}

/** A token's text with its white space made visible. */
function shownText(text: string): string {
  return text === "" ? "∅" : text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ | $/g, "\u00a0");
}

function LoadTable({ heat: { layers, experts, load } }: { readonly heat: Heat }) {
  const { say } = usePage();
  return (
    // biome-ignore lint/a11y/noNoninteractiveTabindex: scrollable regions must be focusable to scroll by keyboard
    <section class="table" tabIndex={0} aria-label={say("routingLoad")}>
      <table class="load-table">
        <thead>
          <tr>
            <th scope="col">{say("layer")}</th>
            {Array.from({ length: experts }, (_, e) => (
              <th key={e} scope="col">
                {e}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {layers.map((layer, i) => (
            <tr key={layer}>
              <th scope="row">{layer}</th>
              {Array.from({ length: experts }, (_, e) => (
                <td key={e}>{load[i * experts + e]}</td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
    </section>
  );
}
