"""Peak memory against batch, sequence and vocabulary: kd beside the obvious loop, as one page of HTML."""
