from tasks.script import summary_of_pairs


def test_the_tasks_own_scores_have_readable_names():
    result = {
        "value": 1.5,
        "scores": {"fid": {"metric": "FID", "value": 1.5, "error": None}},
        "samples": 8,
        "image_format": "png",
        "extra_scores": ["recognised", "psnr_hole", "psnr_hole_mean_colour", "miou", "other"],
        "recognised": 0.5,
        "psnr_hole": 14.0612,
        "psnr_hole_mean_colour": 8.9,
        "miou": 0.25,
        "other": 3,
        "seconds": 2,
        "nfe": 16,
        "sheet": "sheet.png",
    }
    assert summary_of_pairs(result).splitlines() == [
        "score       FID 1.500 (8 samples), recognized samples 0.5, PSNR in holes 14.06 dB, "
        "PSNR of holes in the mean color 8.9 dB, mean IoU 0.25, other 3",
        "samples     8 in 2 s, NFE 16",
        "picture     sheet.png",
    ]
