/** The settings of one conversation: system prompt and sampling. */
import { useEffect, useId, useState } from "preact/hooks";
import { type Controls, type Conversation, DEFAULT_CONTROLS } from "./conversation.ts";
import { Icon } from "./icons.tsx";
import { usePage } from "./page.ts";
import type { Word } from "./words.ts";

interface ControlRow {
  readonly name: keyof Controls;
  readonly hint: Word;
  readonly min: number;
  readonly max: number;
  readonly step: number;
}

/** The sampling controls, within the ranges that the API accepts. */
const ROWS: readonly ControlRow[] = [
  { name: "temperature", hint: "temperatureHint", min: 0, max: 2, step: 0.1 },
  { name: "topP", hint: "topPHint", min: 0.01, max: 1, step: 0.01 },
  { name: "topK", hint: "topKHint", min: 0, max: 1_000_000, step: 1 },
  { name: "maxTokens", hint: "maxTokensHint", min: 1, max: 1_000_000, step: 1 },
  { name: "seed", hint: "seedHint", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1 },
  { name: "presencePenalty", hint: "presencePenaltyHint", min: -2, max: 2, step: 0.1 },
  { name: "frequencyPenalty", hint: "frequencyPenaltyHint", min: -2, max: 2, step: 0.1 },
  { name: "repetitionPenalty", hint: "repetitionPenaltyHint", min: 0.01, max: 10, step: 0.01 },
];

export interface SettingsParts {
  readonly conversation: Conversation;
  readonly onChange: (conversation: Conversation) => void;
  readonly onClose: () => void;
}

export function Settings({ conversation, onChange, onClose }: SettingsParts) {
  const { say } = usePage();
  const id = useId();
  const { controls } = conversation;
  const set = (changes: Partial<Controls>) => onChange({ ...conversation, controls: { ...controls, ...changes } });
  return (
    <aside class="panel" aria-labelledby={`${id}-title`}>
      <header class="panel-head">
        <h2 id={`${id}-title`}>{say("settingsOf")}</h2>
        <button type="button" class="quiet square" aria-label={say("close")} onClick={onClose}>
          <Icon name="close" />
        </button>
      </header>
      <div class="panel-body">
        <label for={`${id}-system`}>{say("system")}</label>
        <p class="hint" id={`${id}-system-hint`}>
          {say("systemHint")}
        </p>
        <textarea
          id={`${id}-system`}
          aria-describedby={`${id}-system-hint`}
          rows={5}
          value={conversation.system}
          onInput={(event) => onChange({ ...conversation, system: event.currentTarget.value })}
        />
        <fieldset class="controls">
          <legend>{say("sampling")}</legend>
          <p class="hint">{say("samplingHint")}</p>
          {ROWS.map((row) => (
            <Control key={row.name} row={row} value={controls[row.name]} onChange={(value) => set({ [row.name]: value })} />
          ))}
          <button type="button" onClick={() => set(DEFAULT_CONTROLS)}>
            {say("reset")}
          </button>
        </fieldset>
      </div>
    </aside>
  );
}

interface ControlParts {
  readonly row: ControlRow;
  readonly value: number | null;
  readonly onChange: (value: number | null) => void;
}

/** An input for one control. It applies when the field loses focus, clamped to the range; an empty field restores the default. */
function Control({ row: { name, hint, min, max, step }, value, onChange }: ControlParts) {
  const { say } = usePage();
  const id = useId();
  const [text, setText] = useState("");
  useEffect(() => setText(value === null ? "" : String(value)), [value]);
  return (
    <div class="control">
      <label for={id}>{say(name)}</label>
      <input
        id={id}
        type="number"
        inputMode="decimal"
        min={min}
        max={max}
        step={step}
        placeholder={say("byModel")}
        aria-describedby={`${id}-hint`}
        value={text}
        onInput={(event) => setText(event.currentTarget.value)}
        onChange={({ currentTarget: { valueAsNumber } }) => {
          const number = step === 1 ? Math.round(valueAsNumber) : valueAsNumber;
          const within = Number.isNaN(number) ? null : Math.min(max, Math.max(min, number));
          setText(within === null ? "" : String(within));
          onChange(within);
        }}
      />
      <p class="hint" id={`${id}-hint`}>
        {say(hint)}
      </p>
    </div>
  );
}
