/** What to try first with the models this project trains: captions they know. Other models start with an empty field. */

const EMOJI = [
  "a rooster on a blue background",
  "a red heart on a yellow background",
  "an octopus",
  "a slice of watermelon",
  "a fox on a green background",
  "a jack-o-lantern",
  "a rainbow",
  "a penguin on a pink background",
];

export const ideasFor = (name: string): string[] => (name.startsWith("emoji-64") ? EMOJI : []);
