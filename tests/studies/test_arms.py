"""No two models of a picture look the same."""

from studies.arms import Arm, mla


def test_models_of_one_picture_differ_in_color_line_or_marker():
    others = [Arm(name, changes=more) for name in ('MHA', 'GQA-2', 'MQA') for more in ((), ('kv_lr=1/8',))]
    latents = [mla(latent, *more) for latent in ('1', '1/2', '1/4', '1/8', '1/16') for more in ((), ('kv_lr=1/8',))]
    looks = [arm.look() for arm in (*others, *latents, mla('1/2', 'latent norm'), mla('1/2', 'R=3d/4'))]
    assert len({str(sorted(look.items(), key=str)) for look in looks}) == len(looks)
    colors = {arm.attention: arm.look()['color'] for arm in (*others, mla('1/2'))}
    assert len(set(colors.values())) == 4


def test_labels_say_what_an_arm_is():
    arm = mla('2/3', 'RoPE', 'kv_lr=1/8')
    assert arm.label == 'MLA, r=2C/3, RoPE, kv_lr=1/8' and mla('1').label == 'MLA, r=C'
    assert arm.keys(128) == dict(attention='mla', n_latent=85, pos='rope', kv_lr=1 / 8)
    assert Arm('MHA').keys(128) == dict(kv_lr=1.0)
