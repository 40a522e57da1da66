"""What tells the brightness of a crop: a linear layer on the pooled features of an unmasked student."""

from torch import nn

from .pretraining import Pretraining


class Brightness(Pretraining):
    def __init__(self, student, objective, terms, precision):
        super().__init__(student, objective, terms, precision)
        self.head = nn.Linear(student.features.size, 1)

    def outputs(self, views, mask, pair):
        voxel_mask = views.new_zeros(views.shape).bool()
        seen = self.student(views, mask, voxel_mask)
        return {"views": views, "told": self.head(seen.pooled)[:, 0].float(), "encoded": seen.encoded}
