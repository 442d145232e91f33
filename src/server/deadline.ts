/** Waiting with a time limit. Knows no connection. */

/** Resolves when `work` does, or after `ms` milliseconds, whichever comes first. The timer does not outlive the wait. */
export async function within(ms: number, work: Promise<unknown>): Promise<void> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<void>((resolve) => {
    timer = setTimeout(resolve, ms);
  });
  try {
    await Promise.race([work, late]);
  } finally {
    clearTimeout(timer);
  }
}
