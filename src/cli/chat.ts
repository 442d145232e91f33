/** `mixtape chat`: a conversation in the terminal, over a pipe, or a single question. */
import type { Command } from "commander";
import { fail, oneLine, UsageError } from "./failure.ts";
import {
  addAdapterOption,
  addModelOptions,
  addSamplingOptions,
  examples,
  generationOptions,
  type ModelFlags,
  type SamplingFlags,
} from "./options.ts";
import type { Session } from "./session.ts";
import { colours, notice } from "./terminal.ts";

interface ChatFlags extends ModelFlags, SamplingFlags {
  readonly system?: string;
  readonly load?: string;
}

export function addChat(program: Command): void {
  const command = program
    .command("chat")
    .description("Chat with a model. With a question, print one answer. From a pipe, each line is a message.")
    .argument("[question]", "answer this question and exit")
    .optionsGroup("Options:")
    .option("--system <text>", "system message")
    .option("--load <file>", "continue with messages that /save wrote");
  addSamplingOptions(addAdapterOption(addModelOptions(command)))
    .addHelpText(
      "after",
      `${examples(
        ["mixtape chat", "a conversation; /help lists its commands"],
        ['mixtape chat "Who are you?"', "one answer"],
        ["mixtape chat --system 'Answer in one word.' < questions.txt", "one message per line"],
        ["mixtape chat --adapter runs/shop --adapter runs/polite=0.5", "with two LoRA adapters"],
        ["mixtape chat -m baidu/ERNIE-4.5-21B-A3B-PT --dtype int8", "a model from the hub"],
      )}
In the conversation:
  /system TEXT  /adapter on|off  /reset  /regenerate  /save FILE  /load FILE
  /stats  /help  /exit
  //word sends the message /word; a path is a message as it is.
  A line that ends with \\ goes on in the next; """ opens and closes a block of lines.
  Ctrl-C stops the answer, and at the prompt clears the line, twice leaves. Ctrl-D leaves.
`,
    )
    .action(chat);
}

async function chat(question: string | undefined, flags: ChatFlags): Promise<void> {
  if (question !== undefined && question.trim() === "") throw new UsageError("the question is empty: at least one character is needed");
  const [{ findModel, openModel, openTokenizer }, { Conversation }, { Session }] = await Promise.all([
    import("./models.ts"),
    import("./conversation.ts"),
    import("./session.ts"),
  ]);
  const { folder, adapters } = await findModel(flags);
  const tokenizer = await openTokenizer(folder);
  if (tokenizer.chat_template === null)
    throw new UsageError(`${flags.model} has no chat template, so it can't chat; 'mixtape generate' continues plain text with it`);
  const conversation = new Conversation(flags.system);
  if (flags.load !== undefined) {
    await conversation.load(flags.load);
    if (flags.system !== undefined) conversation.system = flags.system;
  }
  const model = await openModel(folder, flags, adapters);
  const out = { text: (piece: string) => void process.stdout.write(piece), notice, speed: process.stdout.isTTY === true };
  const session = new Session({ model, tokenizer, conversation }, generationOptions(flags), out);
  try {
    if (question !== undefined) await once(session, question);
    else if (process.stdin.isTTY) await converse(session, `${flags.model}, ${model.device}. /help lists commands, Ctrl-D leaves.`);
    else await pipe(session);
  } finally {
    await model.dispose();
  }
}

async function once(session: Session, question: string): Promise<void> {
  let stopped = false;
  const stop = () => {
    stopped = true;
    session.stop();
  };
  process.once("SIGINT", stop);
  try {
    await session.ask(question);
  } finally {
    process.off("SIGINT", stop);
  }
  if (stopped) process.exitCode = 130;
}

/** Reads messages and commands line by line; the first that fails ends the session. */
async function pipe(session: Session): Promise<void> {
  const { pipedLines, readMessage } = await import("./input.ts");
  const lines = pipedLines(process.stdin);
  try {
    for (;;) {
      const message = await readMessage(lines, "", "");
      if (message === null || !(await session.take(message))) return;
    }
  } finally {
    lines.close();
  }
}

/** Chats with a person at a terminal: errors are reported, and the conversation continues. */
async function converse(session: Session, welcome: string): Promise<void> {
  const { readMessage, TerminalLines } = await import("./input.ts");
  const { COMMAND_WORDS } = await import("./session.ts");
  const screen = process.stdout.isTTY ? process.stdout : process.stderr;
  const { bold, cyan, dim } = colours(screen);
  const lines = new TerminalLines(process.stdin, screen, { words: COMMAND_WORDS, hint: dim("(Ctrl-C again or Ctrl-D leaves)") });
  const stop = () => session.stop();
  lines.onInterrupt = stop;
  process.on("SIGINT", stop); // sent by another process; from the keyboard, Ctrl-C arrives as a key
  notice(welcome);
  try {
    for (;;) {
      const message = await readMessage(lines, bold(cyan("› ")), dim("… "));
      if (message === null) break;
      try {
        if (!(await session.take(message))) break;
      } catch (error) {
        if (process.env["MIXTAPE_DEBUG"] === "1") fail(error);
        else notice(oneLine(error));
      }
    }
  } finally {
    process.off("SIGINT", stop);
    lines.close();
  }
}
