/** Run by robust.test.ts in a separate process, which it kills: a short run with everything that a resumed one must restore. */
import { existsSync, readdirSync } from "node:fs";
import { AutoModelForCausalLM, PeftModel, Trainer } from "../../src/index.ts";

const [model, folder] = process.argv.slice(2);
const base = await AutoModelForCausalLM.from_pretrained(model, { dtype: "fp32", device: "cpu", threads: 1 });
const adapted = await PeftModel.create(
  base,
  { r: 2, lora_alpha: 4, lora_dropout: 0.1, target_modules: ["q_proj", "up_proj"] },
  { seed: 7 },
);
const rows = Array.from({ length: 7 }, (_, r) => {
  const ids = Array.from({ length: 4 + r }, (_, i) => 3 + ((r * 31 + i * 17) % 500));
  return { input_ids: ids, labels: ids };
});
const trainer = new Trainer({
  model: adapted,
  args: {
    ...{ output_dir: folder, learning_rate: 1e-2, lr_scheduler_type: "cosine", warmup_steps: 3, max_steps: 40, seed: 5 },
    ...{ per_device_train_batch_size: 2, gradient_accumulation_steps: 2, ema_decay: 0.9, logging_steps: 1, group_by_length: true },
    ...{ save_steps: 2, save_total_limit: 2, eval_strategy: "steps", eval_steps: 2, load_best_model_at_end: true },
  },
  train_dataset: rows,
  eval_dataset: rows.slice(0, 2),
  callbacks: [{ on_train_begin: () => void process.stdout.write("ready\n") }],
});
const begun = existsSync(folder) && readdirSync(folder).some((name) => name.startsWith("checkpoint-"));
await trainer.train({ resume_from_checkpoint: begun });
await trainer.save_model();
console.log(
  JSON.stringify(
    trainer.state.log_history.flatMap(({ step, loss, eval_loss }) =>
      (loss ?? eval_loss) === undefined ? [] : [[step, loss ?? null, eval_loss ?? null]],
    ),
  ),
);
