/** One conversation: its header, its messages and the message field. */
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { Composer } from "./composer.tsx";
import { type Conversation, type Message, shownMessages } from "./conversation.ts";
import { Icon, Mark } from "./icons.tsx";
import { MessageView } from "./message.tsx";
import { usePage, useView } from "./page.ts";
import { finishedSentences } from "./speech.ts";

/** Within this distance of the end, in pixels, the reader counts as being at the end. */
const NEAR_END = 80;

/** What is open beside the conversation. */
export type Panel = "experts" | "settings" | null;

interface ChatParts {
  readonly conversation: Conversation;
  readonly panel: Panel;
  readonly onPanel: (panel: Panel) => void;
  readonly onChange: (conversation: Conversation) => void;
  readonly onMenu: () => void;
  /** Id of the answer whose experts are shown. */
  readonly traced: string | null;
  readonly onTraced: (message: string) => void;
}

export function Chat({ conversation, panel, onPanel, onChange, onMenu, traced, onTraced }: ChatParts) {
  const { session, say } = usePage();
  const view = useView(session);
  const scroller = useRef<HTMLDivElement>(null);
  const [atEnd, setAtEnd] = useState(true);
  const messages = shownMessages(conversation);
  const running = view.running.has(conversation.id);
  useSpoken(messages.at(-1) ?? null, running);

  const toEnd = () => scroller.current?.scrollTo({ top: scroller.current.scrollHeight });
  // Keep new text in view, unless the reader has scrolled away.
  useLayoutEffect(() => {
    if (atEnd) toEnd();
  });
  useEffect(() => setAtEnd(true), [messages.length]);

  const model = session.modelOf(conversation);
  return (
    <div class="chat">
      <header class="bar">
        <button type="button" class="quiet square only-narrow" aria-label={say("openNavigation")} onClick={onMenu}>
          <Icon name="menu" />
        </button>
        <h2 class="cut bar-title">{conversation.title || say("newChat")}</h2>
        {model !== "" && (
          <select
            class="model"
            aria-label={say("model")}
            value={model}
            onChange={(event) => onChange({ ...conversation, model: event.currentTarget.value })}
          >
            {(view.models.length === 0 ? [model] : view.models.map(({ id }) => id)).map((name) => (
              <option key={name} value={name}>
                {name}
              </option>
            ))}
          </select>
        )}
        <button
          type="button"
          class="quiet labelled"
          aria-pressed={panel === "experts"}
          onClick={() => onPanel(panel === "experts" ? null : "experts")}
        >
          <Icon name="experts" /> <span>{say("routing")}</span>
        </button>
        <button
          type="button"
          class="quiet labelled"
          aria-pressed={panel === "settings"}
          onClick={() => onPanel(panel === "settings" ? null : "settings")}
        >
          <Icon name="sliders" /> <span>{say("settings")}</span>
        </button>
      </header>
      <Notices />
      <div
        ref={scroller}
        class="scroll"
        onScroll={({ currentTarget: { scrollHeight, scrollTop, clientHeight } }) =>
          setAtEnd(scrollHeight - scrollTop - clientHeight < NEAR_END)
        }
      >
        {messages.length === 0 ? (
          <Greeting demo={view.models.find(({ id }) => id === model)?.demo === true} onPick={(text) => session.send(conversation, text)} />
        ) : (
          <ol class="messages" aria-label={say("chat")}>
            {messages.map((message) => (
              <MessageView
                key={message.id}
                conversation={conversation}
                message={message}
                busy={running}
                waitUntil={view.waits.get(message.id) ?? null}
                traced={message.id === traced}
                onTraced={panel === "experts" ? () => onTraced(message.id) : null}
              />
            ))}
          </ol>
        )}
      </div>
      <div class="below">
        {!atEnd && (
          <button type="button" class="to-end" aria-label={say("toEnd")} onClick={toEnd}>
            <Icon name="down" />
          </button>
        )}
        <Composer
          running={running}
          onSend={(text) => session.send(session.find(conversation.id) ?? conversation, text)}
          onStop={() => session.stop(conversation.id)}
        />
      </div>
    </div>
  );
}

/** Announces each sentence of the answer to screen readers once it is complete, and then the end of the answer. */
function useSpoken(last: Message | null, running: boolean): void {
  const { announce, say } = usePage();
  const content = last?.role === "assistant" ? last.content : "";
  const complete = last?.end === "stop" || last?.end === "length";
  const told = useRef<number | null>(null);
  useEffect(() => {
    if (!running) {
      if (told.current !== null) {
        announce(content.slice(told.current).trim());
        if (complete) announce(say("answerDone"));
      }
      told.current = null;
      return;
    }
    const next = finishedSentences(content, Math.min(told.current ?? 0, content.length));
    announce(next.sentences);
    told.current = next.told;
  }, [content, running, complete, announce, say]);
}

function Notices() {
  const { session, say } = usePage();
  const { connection, storage } = session.view;
  return (
    <>
      {connection === "unreachable" && (
        <div class="notice row between" role="alert">
          <span>
            <Icon name="alert" /> {say("unreachable")}
          </span>
          <button type="button" onClick={() => void session.connect()}>
            {say("retry")}
          </button>
        </div>
      )}
      {storage !== "good" && (
        <p class="notice" role="alert">
          <Icon name="alert" /> {say(storage === "full" ? "notKeptFull" : "notKept")}
        </p>
      )}
    </>
  );
}

/** Questions to begin with: for the demo model, ones that it can answer. */
const EXAMPLES = ["example1", "example2", "example3"] as const;
const DEMO_EXAMPLES = ["demoExample1", "demoExample2", "demoExample3"] as const;

function Greeting({ demo, onPick }: { readonly demo: boolean; readonly onPick: (text: string) => void }) {
  const { say } = usePage();
  return (
    <div class="greeting">
      <Mark />
      <p class="greeting-title">{say("greeting")}</p>
      <p class="quiet-text">{say("greetingHint")}</p>
      {demo && <p class="quiet-text">{say("demo")}</p>}
      <ul class="examples">
        {(demo ? DEMO_EXAMPLES : EXAMPLES).map((word) => (
          <li key={word}>
            <button type="button" onClick={() => onPick(say(word))}>
              {say(word)}
            </button>
          </li>
        ))}
      </ul>
    </div>
  );
}
