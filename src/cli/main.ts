/**
 * The command `mixtape`: its list of commands, and what happens when one fails. Commands import what they need when they run,
 * so that `--help` and the first token are fast.
 */
import { readFileSync } from "node:fs";
import { Command } from "commander";
import { addAugment } from "./augment.ts";
import { addBench } from "./bench.ts";
import { addChat } from "./chat.ts";
import { addCompletion } from "./completion.ts";
import { addExport } from "./export.ts";
import { endOnBrokenOutput, fail, misspelt } from "./failure.ts";
import { addGenerate } from "./generate.ts";
import { addInfo } from "./info.ts";
import { addInventory } from "./inventory.ts";
import { addKeys } from "./keys.ts";
import { addMerge } from "./merge.ts";
import { examples } from "./options.ts";
import { addPull } from "./pull.ts";
import { addQuantize } from "./quantize.ts";
import { addRouting } from "./routing.ts";
import { addServe } from "./serve.ts";
import { addTrain } from "./train.ts";
import { addVerify } from "./verify.ts";

const { version } = JSON.parse(readFileSync(new URL("../../package.json", import.meta.url), "utf8")) as { version: string };

const program = new Command("mixtape")
  .description("Run, serve and train ERNIE-4.5 mixture-of-experts language models.")
  .version(version, "-v, --version", "print the version")
  .helpOption("-h, --help", "print help")
  .helpCommand("help [command]", "print the help of a command")
  .exitOverride()
  // Errors are thrown and reported in one place; requested help still goes to standard output.
  .configureOutput({ writeErr: () => {} })
  .addHelpText(
    "after",
    examples(
      ["mixtape chat", "chat with the bundled model"],
      ['mixtape generate "To save a document" --greedy', "continue a text"],
      ["mixtape serve", "an OpenAI-compatible server and a chat page, on this machine"],
      ['mixtape routing "你好" --svg routing.svg', "see which experts a prompt uses"],
      ["mixtape serve", "answer many users over HTTP"],
      ["mixtape train recipe.yaml --dry-run", "fine-tune a model with a file of examples"],
      ["mixtape generate --help", "the options of a command"],
    ) +
      "\nEnvironment:\n" +
      "  MIXTAPE_MODEL  the model when -m is not given    MIXTAPE_DEBUG=1  show the stack of errors\n" +
      "  MIXTAPE_ISA    force an instruction set          NO_COLOR=1       no colours",
  );

/** Other ways to ask for the version. */
const VERSION = new Set(["version", "-V"]);

const commands = [
  addChat,
  addGenerate,
  addServe,
  addKeys,
  addRouting,
  addInfo,
  addAugment,
  addTrain,
  addMerge,
  addPull,
  addInventory,
  addQuantize,
  addExport,
  addVerify,
  addBench,
  addCompletion,
];
for (const add of commands) await add(program);

endOnBrokenOutput();
const given = process.argv.slice(2);
try {
  if (given.length === 0) program.outputHelp();
  else await program.parseAsync(VERSION.has(given[0]) ? ["--version"] : given, { from: "user" });
} catch (error) {
  process.exitCode = fail(misspelt(error, given));
}
