// The bundled pictures; each is offered where the model has a class of its `label`.

export const EXAMPLES = [
  { file: "cat.jpg", label: "cat", alt: "A cat's face" },
  { file: "horse.png", label: "horse", alt: "The silhouette of a horse" },
  { file: "rocket.jpg", label: "airplane", alt: "A rocket that takes off: none of the classes" },
  ...Array.from({ length: 10 }, (_, digit) => ({
    file: `digits-${digit}.png`,
    label: `${digit}`,
    alt: `The digit ${digit}`,
  })),
];
