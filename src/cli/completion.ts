/** `mixtape completion`: scripts that complete commands, options and their values in bash, zsh and fish, made from the table of commands. */
import { type Command, InvalidArgumentError, type Option } from "commander";
import { examples } from "./options.ts";

const SHELLS = { bash, zsh, fish } as const;
type Shell = keyof typeof SHELLS;

export function addCompletion(program: Command): void {
  program
    .command("completion")
    .description("Print a script that completes commands, options and their values.")
    .argument("<shell>", Object.keys(SHELLS).join(", "), (text): Shell => {
      if (Object.hasOwn(SHELLS, text)) return text as Shell;
      throw new InvalidArgumentError(`It must be ${Object.keys(SHELLS).join(", ")}.`);
    })
    .addHelpText(
      "after",
      examples(
        ['eval "$(mixtape completion bash)"', "in ~/.bashrc"],
        ['eval "$(mixtape completion zsh)"', "in ~/.zshrc, after compinit"],
        ["mixtape completion fish > ~/.config/fish/completions/mixtape.fish", "once"],
      ),
    )
    .action((shell: Shell) => void process.stdout.write(SHELLS[shell](entriesOf(program))));
}

/** A command with what can follow it. */
interface Entry {
  /** The words after `mixtape`: "", `chat`, `keys create`. */
  readonly path: string;
  readonly description: string;
  readonly options: readonly Option[];
  readonly commands: readonly { readonly name: string; readonly description: string }[];
}

function entriesOf(program: Command): Entry[] {
  const visit = (command: Command, path: string): Entry[] => {
    const help = command.createHelp();
    const inner = command.commands.filter((each) => each.name() !== "help");
    const entry = {
      path,
      description: firstSentence(command.description()),
      options: help.visibleOptions(command),
      commands: inner.map((each) => ({ name: each.name(), description: firstSentence(each.description()) })),
    };
    return [entry, ...inner.flatMap((each) => visit(each, `${path} ${each.name()}`.trim()))];
  };
  return visit(program, "");
}

function firstSentence(text: string): string {
  return /^.*?[.:](?=\s|$)/.exec(text)?.[0].slice(0, -1) ?? text;
}

const flagsOf = ({ long, short }: Option): string[] => [long, short].flatMap((flag) => flag ?? []);
/** In single quotes, for each of the shells. */
const quoted = (text: string): string => `'${text.replaceAll("'", `'\\''`)}'`;

/** Sets `at` to the deepest command of the words before the one that is completed. */
function pathOf(entries: readonly Entry[], words: string): string {
  const known = entries.filter(({ path }) => path !== "").map(({ path }) => quoted(path));
  return `  local at= word
  for word in ${words}; do
    case "\${at:+$at }$word" in ${known.join("|")}) at="\${at:+$at }$word" ;; esac
  done
`;
}

function bash(entries: readonly Entry[]): string {
  const values = entries.flatMap(({ path, options }) =>
    options.flatMap((option) =>
      option.argChoices
        ? [
            `    ${flagsOf(option)
              .map((flag) => quoted(`${path} ${flag}`))
              .join("|")}) COMPREPLY=($(compgen -W ${quoted(option.argChoices.join(" "))} -- "$cur")); return ;;\n`,
          ]
        : [],
    ),
  );
  const follow = entries.map(({ path, options, commands }) => {
    const words = [...commands.map(({ name }) => name), ...options.flatMap(flagsOf)].join(" ");
    return `    ${quoted(path)}) COMPREPLY=($(compgen -W ${quoted(words)} -- "$cur")) ;;\n`;
  });
  return `# Completions of mixtape for bash. Words that none of them begin like are completed as files.
_mixtape() {
  local cur=\${COMP_WORDS[COMP_CWORD]} before=\${COMP_WORDS[COMP_CWORD-1]}
${pathOf(entries, `"\${COMP_WORDS[@]:1:COMP_CWORD-1}"`)}  COMPREPLY=()
  case "$at $before" in
${values.join("")}  esac
  case "$at" in
${follow.join("")}  esac
}
complete -o default -F _mixtape mixtape
`;
}

function zsh(entries: readonly Entry[]): string {
  const described = (name: string, description: string) => quoted(`${name.replaceAll(":", "\\:")}:${description}`);
  const values = entries.flatMap(({ path, options }) =>
    options.flatMap((option) =>
      option.argChoices
        ? [
            `    ${flagsOf(option)
              .map((flag) => quoted(`${path} ${flag}`))
              .join("|")}) compadd -- ${option.argChoices.map(quoted).join(" ")}; return ;;\n`,
          ]
        : [],
    ),
  );
  const follow = entries.map(({ path, options, commands }) => {
    const names = commands.map(({ name, description }) => described(name, description));
    const flags = options.flatMap((option) => flagsOf(option).map((flag) => described(flag, firstSentence(option.description))));
    return `    ${quoted(path)}) commands=(${names.join(" ")}); options=(${flags.join(" ")}) ;;\n`;
  });
  return `#compdef mixtape
# Completions of mixtape for zsh.
_mixtape() {
  local -a commands options
${pathOf(entries, `"\${words[@]:1:$((CURRENT - 2))}"`)}  case "$at \${words[CURRENT-1]}" in
${values.join("")}  esac
  case "$at" in
${follow.join("")}  esac
  if [[ $PREFIX == -* ]]; then _describe option options
  elif (( \${#commands} )); then _describe command commands
  else _files
  fi
}
compdef _mixtape mixtape
`;
}

function fish(entries: readonly Entry[]): string {
  const lines = entries.flatMap(({ path, options, commands }) => {
    const names = commands.map(({ name }) => name).join(" ");
    const [first, second] = path.split(" ");
    const within = second
      ? `__fish_seen_subcommand_from ${first}; and __fish_seen_subcommand_from ${second}`
      : `__fish_seen_subcommand_from ${first}`;
    const here = path === "" ? "__fish_use_subcommand" : names === "" ? within : `${within}; and not __fish_seen_subcommand_from ${names}`;
    return [
      ...commands.map(({ name, description }) => `complete -c mixtape -f -n ${fishQuoted(here)} -a ${name} -d ${fishQuoted(description)}`),
      ...options.map((option) => {
        const { long, short, argChoices, required } = option;
        const takes = argChoices ? ` -x -a ${fishQuoted(argChoices.join(" "))}` : required ? " -r" : "";
        const flag = `${short ? ` -s ${short.slice(1)}` : ""}${long ? ` -l ${long.slice(2)}` : ""}`;
        return `complete -c mixtape -n ${fishQuoted(here)}${flag}${takes} -d ${fishQuoted(firstSentence(option.description))}`;
      }),
    ];
  });
  return `# Completions of mixtape for fish.\n${lines.join("\n")}\n`;
}

/** fish escapes within single quotes by a backslash. */
function fishQuoted(text: string): string {
  return `'${text.replaceAll("\\", "\\\\").replaceAll("'", "\\'")}'`;
}
