/** Which experts wrote an answer: layers by experts, and each token's own. */
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import type { Say } from "./app.tsx";
import type { Routing } from "./wire.ts";

const CELL = 14;
const LABEL = 30;

export function Experts({ say, routing, writing }: { say: Say; routing: readonly Routing[]; writing: boolean }) {
  const [chosen, setChosen] = useState<number | null>(null);
  const canvas = useRef<HTMLCanvasElement>(null);
  const at = Math.min(chosen ?? routing.length - 1, routing.length - 1);
  const token = routing[at];
  const { layers } = token;
  const load = useMemo(() => {
    const count = layers.map(() => new Map<number, number>());
    for (const { experts } of routing)
      for (const [l, row] of experts.entries()) for (const e of row) count[l]?.set(e, (count[l].get(e) ?? 0) + 1);
    return count;
  }, [routing, layers]);
  const columns = Math.max(...routing.flatMap((r) => r.experts.flatMap((row) => row.map((e) => e + 1))));

  useEffect(() => {
    const context = canvas.current?.getContext("2d");
    if (!canvas.current || !context) return;
    const scale = devicePixelRatio;
    const [width, height] = [LABEL + columns * CELL, layers.length * CELL];
    canvas.current.width = width * scale;
    canvas.current.height = height * scale;
    canvas.current.style.width = `${width}px`;
    context.scale(scale, scale);
    const ink = getComputedStyle(canvas.current).color;
    const most = Math.max(1, ...load.flatMap((row) => [...row.values()]));
    context.font = "10px system-ui, sans-serif";
    context.textBaseline = "middle";
    layers.forEach((layer, l) => {
      context.fillStyle = ink;
      context.fillText(String(layer), 4, l * CELL + CELL / 2);
      for (let e = 0; e < columns; e++) {
        const share = (load[l].get(e) ?? 0) / most;
        context.fillStyle = `hsl(${320 - 60 * (1 - share)} ${30 + 50 * share}% ${12 + 58 * Math.sqrt(share)}%)`;
        context.fillRect(LABEL + e * CELL, l * CELL, CELL - 1, CELL - 1);
      }
      for (const e of token.experts[l] ?? []) {
        context.strokeStyle = "#ffd27a";
        context.lineWidth = 2;
        context.strokeRect(LABEL + e * CELL + 1, l * CELL + 1, CELL - 3, CELL - 3);
      }
    });
  }, [load, token, columns, layers]);

  return (
    <section class="experts" aria-label={say("routing")}>
      <p class="hint">{say("routingHint")}</p>
      {/* biome-ignore lint/a11y/noNoninteractiveTabindex: what scrolls must be reachable by keyboard */}
      <section class="scroll" tabIndex={0} aria-label={say("layer")}>
        <canvas ref={canvas} role="img" aria-label={say("routingHint")} />
      </section>
      <div class="tokens">
        {routing.map((r, i) => (
          <button
            type="button"
            key={`${i}:${r.text}`}
            class="token"
            aria-pressed={i === at}
            aria-label={`${say("token")} ${i + 1}: ${r.text}`}
            onClick={() => setChosen(i)}
          >
            {r.text.trim() === "" ? "␣" : r.text}
          </button>
        ))}
      </div>
      {!writing && (
        <details>
          <summary>
            {say("experts")}: {token.text}
          </summary>
          <table>
            <thead>
              <tr>
                <th scope="col">{say("layer")}</th>
                <th scope="col">{say("experts")}</th>
              </tr>
            </thead>
            <tbody>
              {layers.map((layer, l) => (
                <tr key={layer}>
                  <th scope="row">{layer}</th>
                  <td>
                    {(token.experts[l] ?? []).map((e, k) => `${e} (${((token.weights[l]?.[k] ?? 0) * 100).toFixed(0)} %)`).join(", ")}
                  </td>
                </tr>
              ))}
            </tbody>
          </table>
        </details>
      )}
    </section>
  );
}
