/** The colours of the heat maps: magma, which is perceptually uniform, so that equal steps of a value look equal. */

/** Red, green, blue from 0 to 255. */
export type Rgb = readonly [number, number, number];

/** At every tenth of the scale (Smith and van der Walt, https://bids.github.io/colormap, CC0). */
const MAGMA: readonly Rgb[] = [
  [0, 0, 4],
  [20, 14, 54],
  [59, 15, 112],
  [100, 26, 128],
  [140, 41, 129],
  [183, 55, 121],
  [222, 73, 104],
  [247, 112, 92],
  [254, 159, 109],
  [254, 207, 146],
  [252, 253, 191],
];

/** The colour at `t` from 0 (dark) to 1 (bright). */
export function magma(t: number): Rgb {
  const at = Math.min(Math.max(t, 0), 1) * (MAGMA.length - 1);
  const i = Math.min(Math.floor(at), MAGMA.length - 2);
  const mix = (channel: 0 | 1 | 2) => Math.round(MAGMA[i][channel] + (MAGMA[i + 1][channel] - MAGMA[i][channel]) * (at - i));
  return [mix(0), mix(1), mix(2)];
}

export function hex(rgb: Rgb): string {
  return `#${rgb.map((c) => c.toString(16).padStart(2, "0")).join("")}`;
}

const CUBE = [0, 95, 135, 175, 215, 255];

/** The nearest colour in the 6 x 6 x 6 cube of 256-colour terminals. */
export function ansi256(rgb: Rgb): number {
  const nearest = (c: number) => CUBE.reduce((best, level, i) => (Math.abs(level - c) < Math.abs(CUBE[best] - c) ? i : best), 0);
  return 16 + 36 * nearest(rgb[0]) + 6 * nearest(rgb[1]) + nearest(rgb[2]);
}
