/** Whether a config describes the model whose tensors lie beside it. Reads names and shapes only, and builds nothing. */
import type { Checkpoint } from "../checkpoint/checkpoint.ts";
import { ConfigError, type ErnieConfig, readConfig } from "./config.ts";

/**
 * The config of a checkpoint, after comparing what decides the number of its tensors with those that are there.
 * @throws ConfigError for an invalid config, or one of another model, saying what it says and what the weights hold
 */
export function configFor({ config: raw, tensors, blocks }: Pick<Checkpoint, "config" | "tensors" | "blocks">): ErnieConfig {
  const config = readConfig(raw);
  let [layers, experts] = [0, 0];
  for (const [name, { shape }] of tensors) {
    const [, layer, rest = ""] = /^model\.layers\.(\d{1,9})\.(.*)$/.exec(name) ?? [];
    if (layer === undefined) continue;
    layers = Math.max(layers, Number(layer) + 1);
    const expert = /^mlp\.experts\.(\d{1,9})\./.exec(rest)?.[1];
    if (expert !== undefined) experts = Math.max(experts, Number(expert) + 1);
    else if (/^mlp\.experts\.\w+_proj$/.test(rest)) experts = Math.max(experts, shape[0] ?? 0);
  }
  const table = blocks.get("model.embed_tokens.weight")?.shape ?? tensors.get("model.embed_tokens.weight")?.shape ?? [];
  const compare = (field: string, said: number, held: number | undefined, what: string) => {
    if (held !== undefined && held > 0 && said !== held)
      throw new ConfigError(
        `config.json: ${field} is ${said}, but the weights hold ${held} ${what}; they belong to different models, or one was edited`,
      );
  };
  compare("num_hidden_layers", config.layers, layers, "layers");
  compare("vocab_size", config.vocabSize, table[0], "rows of embeddings");
  compare("hidden_size", config.hiddenSize, table[1], "numbers per embedding");
  if (config.moe) compare("moe_num_experts", config.moe.experts, experts, "experts");
  const { classifier } = config;
  if (!classifier) return config;
  const score = tensors.get("score.weight")?.shape;
  if (score) compare("id2label", classifier.labels.length, score[0], "rows of the head 'score'");
  return { ...config, classifier: { ...classifier, bias: tensors.has("score.bias") } };
}
