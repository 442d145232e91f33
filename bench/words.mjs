/**
 * The baseline of bench/tuning.mjs: a logistic regression on a bag of words. It knows no model. Features are tf-idf of words and pairs of words, and,
 * of Chinese, of one to three characters; each text's features have length 1.
 */

const HAN = /\p{Script=Han}/u;

/** The terms of a text, repeated as often as they occur. */
export function terms(text) {
  const found = [];
  for (const [piece] of text.toLowerCase().matchAll(/\p{Script=Han}+|[\p{L}\p{N}']+|[!?！？]/gu)) {
    if (!HAN.test(piece)) {
      found.push(piece);
      continue;
    }
    const characters = [...piece];
    for (let n = 1; n <= 3; n++) for (let i = 0; i + n <= characters.length; i++) found.push(characters.slice(i, i + n).join(""));
  }
  const words = found.filter((term) => !HAN.test(term));
  for (let i = 1; i < words.length; i++) found.push(`${words[i - 1]} ${words[i]}`);
  return found;
}

/** How texts become vectors: the terms of at least `least` training texts, and the weight of each. */
export function vocabularyOf(texts, least = 2) {
  const documents = new Map();
  for (const text of texts) for (const term of new Set(terms(text))) documents.set(term, (documents.get(term) ?? 0) + 1);
  const kept = [...documents].filter(([, n]) => n >= least);
  return new Map(kept.map(([term, n], index) => [term, { index, weight: Math.log((1 + texts.length) / (1 + n)) + 1 }]));
}

/** A text's features: [index, value], of length 1 together. */
export function features(text, vocabulary) {
  const counts = new Map();
  for (const term of terms(text)) if (vocabulary.has(term)) counts.set(term, (counts.get(term) ?? 0) + 1);
  const pairs = [...counts].map(([term, n]) => [vocabulary.get(term).index, (1 + Math.log(n)) * vocabulary.get(term).weight]);
  const length = Math.hypot(...pairs.map(([, x]) => x)) || 1;
  return pairs.map(([index, x]) => [index, x / length]);
}

/**
 * Multinomial logistic regression: minimises the sum of the cross-entropies + |W|^2 / 2C, scikit-learn's objective, over all rows at once
 * with Adam (https://arxiv.org/abs/1412.6980). Rows are lists of [index, value]. Returns a function from a row to its class.
 */
export function logisticRegression(rows, labels, { classes, width, C = 10, iterations = 200, rate = 0.2 }) {
  const size = classes * (width + 1); // the last column is the bias, which is not regularised
  const [W, m, v, gradient] = Array.from({ length: 4 }, () => new Float64Array(size));
  const scores = (row) => {
    const s = new Float64Array(classes);
    for (let c = 0; c < classes; c++) {
      const at = c * (width + 1);
      s[c] = W[at + width];
      for (const [i, x] of row) s[c] += W[at + i] * x;
    }
    return s;
  };
  for (let step = 1; step <= iterations; step++) {
    for (let i = 0; i < size; i++) gradient[i] = i % (width + 1) === width ? 0 : W[i] / C;
    for (const [r, row] of rows.entries()) {
      const s = scores(row);
      const most = Math.max(...s);
      const total = s.reduce((sum, x) => sum + Math.exp(x - most), 0);
      for (let c = 0; c < classes; c++) {
        const at = c * (width + 1);
        const error = Math.exp(s[c] - most) / total - (labels[r] === c ? 1 : 0);
        gradient[at + width] += error;
        for (const [i, x] of row) gradient[at + i] += error * x;
      }
    }
    const now = rate * 0.5 * (1 + Math.cos((Math.PI * step) / iterations));
    for (let i = 0; i < size; i++) {
      m[i] += 0.1 * (gradient[i] - m[i]);
      v[i] += 0.001 * (gradient[i] ** 2 - v[i]);
      W[i] -= (now * (m[i] / (1 - 0.9 ** step))) / (Math.sqrt(v[i] / (1 - 0.999 ** step)) + 1e-8);
    }
  }
  return (row) => {
    const s = scores(row);
    return s.indexOf(Math.max(...s));
  };
}
