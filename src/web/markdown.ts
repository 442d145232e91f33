/**
 * Renders a model's Markdown as safe HTML: raw HTML is escaped, images are not loaded, and the result is sanitised once more.
 * Knows nothing of the page.
 */
import DOMPurify from "dompurify";
import hljs from "highlight.js/lib/core";
import bash from "highlight.js/lib/languages/bash";
import cpp from "highlight.js/lib/languages/cpp";
import css from "highlight.js/lib/languages/css";
import go from "highlight.js/lib/languages/go";
import java from "highlight.js/lib/languages/java";
import json from "highlight.js/lib/languages/json";
import python from "highlight.js/lib/languages/python";
import rust from "highlight.js/lib/languages/rust";
import sql from "highlight.js/lib/languages/sql";
import typescript from "highlight.js/lib/languages/typescript";
import xml from "highlight.js/lib/languages/xml";
import yaml from "highlight.js/lib/languages/yaml";
import MarkdownIt from "markdown-it";

const LANGUAGES = { bash, cpp, css, go, java, json, python, rust, sql, typescript, xml, yaml };
/** Longer code blocks are not highlighted: highlighting starts over whenever a line is added. */
const LONGEST_HIGHLIGHTED = 20_000;

for (const [name, language] of Object.entries(LANGUAGES)) hljs.registerLanguage(name, language);

const markdown = createMarkdown();

function createMarkdown(): InstanceType<typeof MarkdownIt> {
  const md = new MarkdownIt({ html: false, linkify: true, breaks: true });
  const { escapeHtml } = md.utils;
  md.renderer.rules.image = (tokens, i) => escapeHtml(tokens[i].content || String(tokens[i].attrGet("src") ?? ""));
  const code = (text: string, language: string) => {
    const known = text.length <= LONGEST_HIGHLIGHTED && hljs.getLanguage(language);
    const html = known ? hljs.highlight(text, { language, ignoreIllegals: true }).value : escapeHtml(text);
    return `<div class="code"><div class="code-bar"><span>${escapeHtml(language)}</span></div><pre tabindex="0"><code>${html}</code></pre></div>`;
  };
  md.renderer.rules.fence = (tokens, i) => code(tokens[i].content, tokens[i].info.trim().split(/\s+/, 1)[0].toLowerCase());
  md.renderer.rules.code_block = (tokens, i) => code(tokens[i].content, "");
  md.renderer.rules.table_open = () => '<div class="table" tabindex="0"><table>';
  md.renderer.rules.table_close = () => "</table></div>";
  return md;
}

/** The HTML of each block of the text, in order and not yet sanitised. While a text grows, only its last blocks change. */
export function renderBlocks(text: string): string[] {
  const env = {};
  const tokens = markdown.parse(text, env);
  const blocks: string[] = [];
  let from = 0;
  let depth = 0;
  for (const [i, { nesting }] of tokens.entries()) {
    depth += nesting;
    if (depth > 0) continue;
    blocks.push(markdown.renderer.render(tokens.slice(from, i + 1), markdown.options, env));
    from = i + 1;
  }
  return blocks;
}

const purify = createPurify();

function createPurify(): typeof DOMPurify {
  const purify = DOMPurify(window);
  purify.addHook("afterSanitizeAttributes", (node) => {
    if (node.tagName !== "A") return;
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer nofollow");
  });
  return purify;
}

/** Sanitises HTML, keeping only the elements and attributes that the renderer writes. */
export function clean(html: string): string {
  return purify.sanitize(html, {
    ALLOWED_TAGS: (
      "a blockquote br code del div em h1 h2 h3 h4 h5 h6 hr li ol p pre s span strong table tbody td th thead tr ul" as const
    ).split(" "),
    ALLOWED_ATTR: ["href", "class", "start", "tabindex"],
    ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
    ALLOW_DATA_ATTR: false,
    ALLOW_ARIA_ATTR: false,
  });
}
