/** Paints how often each expert was chosen, with layers as rows and experts as columns. Knows nothing of the page beyond its canvas. */

export interface Heat {
  readonly layers: readonly number[];
  readonly experts: number;
  /** How often each expert was chosen, [layers, experts]. */
  readonly load: Uint32Array;
  /** For each layer, the experts of the selected token. */
  readonly outlined: readonly (readonly number[])[];
}

export interface Cell {
  readonly layer: number;
  readonly expert: number;
}

/** Space for the layer numbers on the left and the expert numbers below, in CSS pixels. */
const [LEFT, BELOW] = [30, 20];
const [LEAST_ROW, MOST_ROW, WANTED_HEIGHT] = [9, 22, 150];

/** Models with few layers get tall rows, those with many get short ones. */
function rowHeight({ layers }: Pick<Heat, "layers">): number {
  return Math.min(MOST_ROW, Math.max(LEAST_ROW, Math.floor(WANTED_HEIGHT / layers.length)));
}

/** Returns a lookup of the theme's colours by their names in the style sheet. */
export function coloursOf(element: Element): (name: string) => string {
  const probe = document.createElement("span");
  probe.hidden = true;
  element.append(probe);
  return (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
}

export function paint(canvas: HTMLCanvasElement, heat: Heat, colour: (name: string) => string): void {
  const { layers, experts, load, outlined } = heat;
  const width = canvas.clientWidth;
  const down = rowHeight(heat);
  const height = layers.length * down + BELOW;
  const scale = devicePixelRatio;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const context = canvas.getContext("2d");
  if (!context) return;
  context.scale(scale, scale);
  const across = (width - LEFT) / experts;
  const gap = across > 6 ? 1.5 : 0.5;
  const box = (layer: number, expert: number) =>
    [LEFT + expert * across + gap / 2, layer * down + gap / 2, across - gap, down - gap] as const;
  const most = load.reduce((a, b) => Math.max(a, b), 0);
  const [empty, full] = [colour("heat-0"), colour("heat-1")];
  for (let i = 0; i < load.length; i++) {
    context.globalAlpha = 1;
    context.fillStyle = empty;
    const at = box(Math.floor(i / experts), i % experts);
    context.fillRect(...at);
    if (load[i] === 0) continue;
    context.globalAlpha = 0.1 + 0.9 * (load[i] / most);
    context.fillStyle = full;
    context.fillRect(...at);
  }
  context.globalAlpha = 1;
  context.lineWidth = 2;
  context.strokeStyle = colour("mark");
  for (const [layer, chosen] of outlined.entries())
    for (const expert of chosen) {
      const [x, y, w, h] = box(layer, expert);
      context.strokeRect(x + 1, y + 1, Math.max(1, w - 2), Math.max(1, h - 2));
    }
  context.fillStyle = colour("muted");
  context.font = `11px ${getComputedStyle(canvas).fontFamily}`;
  context.textAlign = "right";
  context.textBaseline = "middle";
  const everyRow = Math.ceil(13 / down);
  for (const [i, layer] of layers.entries()) if (i % everyRow === 0) context.fillText(String(layer), LEFT - 8, (i + 0.5) * down);
  context.textAlign = "center";
  context.textBaseline = "alphabetic";
  const every = 2 ** Math.ceil(Math.log2(Math.max(1, 28 / across)));
  for (let e = 0; e < experts; e += every) context.fillText(String(e), LEFT + (e + 0.5) * across, height - 4);
}

/** The cell at a point of the canvas, in CSS pixels; null outside the cells. */
export function cellAt(canvas: HTMLCanvasElement, heat: Heat, x: number, y: number): Cell | null {
  const { layers, experts } = heat;
  const expert = Math.floor(((x - LEFT) * experts) / (canvas.clientWidth - LEFT));
  const layer = Math.floor(y / rowHeight(heat));
  return expert >= 0 && expert < experts && layer >= 0 && layer < layers.length ? { layer, expert } : null;
}
