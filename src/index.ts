/** The public API of mixtape. */

export type { LoadAdapterOptions, WeightedAdapterOptions } from "./api/adapters.ts";
export type { Classification, TextClassificationOptions, TextClassificationPipeline } from "./api/classification.ts";
export {
  AutoModelForSequenceClassification,
  type ClassifierOptions,
  type ClassifyOptions,
  type SequenceClassifier,
} from "./api/classifier.ts";
export { type ExportOptions, exportGguf } from "./api/export.ts";
export type { GenerationOptions, ModelInputs } from "./api/generation.ts";
export type { LoadOptions, WeightDtype } from "./api/load.ts";
export { type MergeOptions, mergeAdapter } from "./api/merge.ts";
export type {
  CausalLM,
  CausalLMOutput,
  ForwardOptions,
  GenerateOutput,
  NamedTensor,
  PretrainedOptions,
  RouterOutput,
} from "./api/model.ts";
export { AutoModelForCausalLM } from "./api/model.ts";
export { type CreateOptions, get_peft_model, LoraConfig, type LoraOptions, PeftModel } from "./api/peft.ts";
export { pipeline, type TextGenerationOptions, type TextGenerationOutput, type TextGenerationPipeline } from "./api/pipeline.ts";
export { type QuantizeOptions, quantize, verify } from "./api/quantize.ts";
export { type Streamer, TextStreamer, type TextStreamerOptions } from "./api/streamers.ts";
export { AutoTokenizer } from "./api/tokenizer.ts";
export { instructionSets } from "./backend/native.ts";
export type { ToolChoiceOption, ToolOption } from "./chat/conversation.ts";
export type { ResponseFormatOption } from "./chat/format.ts";
export type { AssistantMessage, ToolCall } from "./chat/message.ts";
export { CheckpointError } from "./checkpoint/error.ts";
export type { DownloadProgress } from "./checkpoint/hub.ts";
export { GrammarError } from "./grammar/error.ts";
export { ConfigError } from "./model/config.ts";
export type { Message } from "./tokenizer/template.ts";
export type { Tokenizer } from "./tokenizer/tokenizer.ts";
export type { TrainingArguments } from "./train/arguments.ts";
export type { CausalExample, ClassExample, PreferenceExample } from "./train/data/example.ts";
export { type OpenOptions, openDataset } from "./train/data/open.ts";
export { type DPOArguments, DPOTrainer, type DPOTrainerOptions } from "./train/dpo.ts";
export type { LogEntry, TrainerControl, TrainerState } from "./train/history.ts";
export type { PreferenceRow } from "./train/preference.ts";
export type { TrainerCallback, TrainerEvent } from "./train/report.ts";
export type { Selection } from "./train/selection.ts";
export {
  DivergenceError,
  Trainer,
  type TrainerOptions,
  type TrainOptions,
  type TrainOutput,
} from "./train/trainer.ts";
